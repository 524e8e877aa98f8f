import pytest
import torch

from vistok import TextAR
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.text_ar import hash_ngrams

SMALL = {
    "codebook_size": 20,
    "num_tokens": 6,
    "text_length": 16,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 48,
}


@pytest.fixture
def model() -> TextAR:
    torch.manual_seed(0)
    return TextAR(**SMALL).eval()


@torch.inference_mode()
def test_cached_steps_equal_the_training_pass(model):
    condition = model.encode_text(["a dog", "猫"])
    indices = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model(condition, indices)
    cache = model.new_cache(2)
    logits = [model.prefill(condition, cache)]
    logits += [model.step(indices[:, i : i + 1], cache) for i in range(5)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_rolled_back_cache_continues_as_if_nothing_had_been_appended(model):
    condition = model.encode_text(["a dog"])
    cache = model.new_cache(1)
    model.prefill(condition, cache)
    length = cache.length
    expected = model.step(torch.tensor([[3]]), cache)
    cache.rollback(length)
    model.step(torch.tensor([[7]]), cache)
    cache.rollback(length)
    torch.testing.assert_close(model.step(torch.tensor([[3]]), cache), expected)


def test_ngrams_are_hashed_by_the_bytes_that_end_them(model):
    texts = model.encode_text(["red apple", "big apple", "apple red"])
    for hashed in hash_ngrams(texts, 2048):
        assert hashed.shape == texts.shape and hashed.min() >= 0 and hashed.max() < 2048
        last = hashed[:, 8]  # of "ple", "pple", " apple", and of what "apple red" ends with
        assert last[0] == last[1] != last[2]


@torch.inference_mode()
def test_words_far_back_reach_every_position_through_the_summary(model):
    # Without blocks nothing but the summary carries the text to the image positions.
    model.blocks = torch.nn.ModuleList()
    indices = torch.zeros(2, 6, dtype=torch.int64)
    logits = model(model.encode_text(["red apple", "big apple"]), indices)
    assert not torch.allclose(logits[0], logits[1])
    alike = model(model.encode_text(["red apple", "red apple"]), indices)
    assert torch.equal(alike[0], alike[1])


@torch.inference_mode()
def test_logits_do_not_depend_on_later_tokens(model):
    condition = model.encode_text(["x"])
    indices = torch.zeros(1, 6, dtype=torch.int64)
    changed = indices.clone()
    changed[:, 3:] = 5
    assert torch.equal(model(condition, indices)[:, :4], model(condition, changed)[:, :4])


@pytest.mark.parametrize("guidance", [ConstantGuidance(1.0), ConstantGuidance(3.0)])
def test_the_same_seed_gives_the_same_tokens_at_batch_1_and_16(model, guidance):
    prompts = [f"prompt {i}" for i in range(16)]
    together = generate_ordered(
        model, model.encode_text(prompts), streams=ImageStreams.from_seeds(range(16)), guidance=guidance
    )
    alone = generate_ordered(
        model, model.encode_text(prompts[5:6]), streams=ImageStreams.from_seeds([5]), guidance=guidance
    )
    assert torch.equal(alone.data[0], together.data[5])
    assert len(together.data.unique(dim=0)) > 1


def test_samples_of_the_first_token_follow_the_model(model):
    """Chi-square over many images with one prompt; 43.8 is the 0.999 quantile at 19 degrees of freedom."""
    num = 4000
    condition = model.encode_text(["dog"]).expand(num, -1)
    drawn = generate_ordered(
        model, condition, streams=ImageStreams.from_seeds(range(num)), num_tokens=1
    ).data[:, 0]
    with torch.inference_mode():
        probs = model.prefill(condition[:1], model.new_cache(1))[0, 0].softmax(dim=0).double()
    expected = probs * num
    counts = torch.bincount(drawn, minlength=20)
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_guidance_of_one_does_not_compute_the_unconditional_branch(model, monkeypatch):
    monkeypatch.setattr(
        model, "null_condition", lambda batch_size: pytest.fail("unconditional branch was run")
    )
    generate_ordered(model, model.encode_text(["dog"]), streams=ImageStreams.from_seeds([0]))


def test_every_parameter_gets_a_gradient_and_dropout_only_acts_in_training():
    model = TextAR(**SMALL, dropout=0.5)
    condition, indices = model.encode_text(["dog"]), torch.arange(6)[None]
    model(condition, indices).log_softmax(dim=-1)[..., 0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not torch.equal(model(condition, indices), model(condition, indices))
    model.eval()
    assert torch.equal(model(condition, indices), model(condition, indices))


@torch.inference_mode()
def test_save_and_load_are_bit_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = TextAR.from_pretrained(tmp_path).eval()
    condition, indices = model.encode_text(["dog"]), torch.arange(6)[None]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    # The mapped file lies otherwise in memory than fresh weights, and matrix kernels choose their order of sums by that.
    torch.testing.assert_close(loaded(condition, indices), model(condition, indices), atol=1e-6, rtol=0)


def test_empty_prompts_are_refused(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        model.encode_text(["dog", "  "])


@pytest.mark.parametrize(
    ("prompt", "kept", "said"),
    [
        (
            "a red house by the sea",
            "a red house by t",
            "has 22 bytes and this model reads 16.*after '...house by t'",
        ),
        ("x" * 17, "x" * 16, "cut after 'x{16}'"),
        (
            "abc" + "é" * 8,
            "abc" + "é" * 6,
            "has 19 bytes.*after 'abcéééééé'",
        ),  # not in the middle of a character
        ("🍎" * 5, "🍎" * 4, "has 20 bytes"),
    ],
)
def test_long_prompts_are_cut_where_the_warning_says(model, prompt, kept, said):
    with pytest.warns(UserWarning, match=said):
        row = model.encode_text([prompt])
    assert row.shape == (1, 16)
    assert torch.equal(row, model.encode_text([kept]))


def test_prompts_that_just_fit_are_read_in_silence(model, recwarn):
    assert bytes(model.encode_text(["é" * 8])[0].tolist()).decode() == "é" * 8
    assert not recwarn
