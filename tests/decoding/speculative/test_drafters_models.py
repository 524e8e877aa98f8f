"""Drafters that run a model: independent ones, early exits, and the target itself, one pass ago."""

from __future__ import annotations

import pytest
import torch

from tests.decoding.speculative.laws import BatchStream, tiny_target
from vistok import FlexARClass, LlamaGenClass, TextAR
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.draft_length import AdaptiveLength, ConfidenceThreshold, FixedLength
from vistok.decoding.speculative.drafters.early_exit import EarlyExitDrafter
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter, maximal_coupling
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.tree import TreeShape
from vistok.models.drafters.early_exit import EarlyExitAdapter, with_early_exit

SIZES = {"dim": 16, "num_heads": 2, "mlp_dim": 24}
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(scope="module")
def target() -> LlamaGenClass:
    return tiny_target()


def generate(target, drafter, condition=LABELS, **options):
    return generate_speculative(
        target, condition, drafter=drafter, streams=BatchStream(len(condition), 0), **options
    )


def make_text_model() -> TextAR:
    torch.manual_seed(0)
    return TextAR(codebook_size=12, num_tokens=8, text_length=8, depth=2, ngram_buckets=16, **SIZES).eval()


def make_long_model() -> FlexARClass:
    torch.manual_seed(0)
    return FlexARClass(codebook_size=12, num_tokens=8, num_classes=3, depth=3, **SIZES).eval()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("tree", [FixedLength(3), TreeShape.chain(3), ConfidenceThreshold(3, 0.0)])
def test_all_that_the_target_drafts_for_itself_is_accepted(target, tree, guidance_scale: float) -> None:
    """So the drafter's cache, positions and guidance are those of the target."""
    result = generate(
        make_long_model(),
        IndependentDrafter(make_long_model(), tree),
        guidance=ConstantGuidance(guidance_scale),
    )
    # 7 tokens follow the first: 3 and one more, then the rest.
    assert result.statistics.row_passes.tolist() == [2, 2, 2]
    # The condition; for each tree the tokens since the last and two levels.
    assert result.statistics.draft_passes == 1 + 2 * 3


def test_all_is_accepted_where_texts_are_read() -> None:
    model = make_text_model()
    texts = model.encode_text(["a", "b c", "def"])
    result = generate(model, IndependentDrafter(model, FixedLength(3)), texts, guidance=ConstantGuidance(1.5))
    assert result.statistics.row_passes.tolist() == [2, 2, 2]


def test_a_running_rate_lengthens_drafts_that_are_accepted() -> None:
    model = make_long_model()
    result = generate(model, IndependentDrafter(model, AdaptiveLength(7, 0.6)))
    # Two tokens while nothing is known (one half of them rejected), then 2.5 of 3 were accepted: five.
    assert result.statistics.row_passes.tolist() == [2, 2, 2]
    stingy = generate(model, IndependentDrafter(model, AdaptiveLength(7, 0.0)))
    assert stingy.statistics.row_passes.tolist() == [4, 4, 4]


def test_a_drafter_must_make_the_same_images(target) -> None:
    def small(**sizes) -> LlamaGenClass:
        return LlamaGenClass(
            **({"codebook_size": 4, "num_tokens": 4, "num_classes": 3, "depth": 1} | SIZES | sizes)
        )

    with pytest.raises(ValueError, match="LlamaGenClass drafts 5 token ids, LlamaGenClass has 4"):
        generate(target, IndependentDrafter(small(codebook_size=5)))
    with pytest.raises(
        ValueError, match=r"another layout \(9 tokens, 3x3\) than the target \(4 tokens, 2x2\)"
    ):
        generate(target, IndependentDrafter(small(num_tokens=9)))
    flex = FlexARClass(codebook_size=4, num_tokens=4, num_classes=3, depth=1, **SIZES)
    with pytest.raises(ValueError, match="another layout"):
        generate(target, IndependentDrafter(flex))
    text = TextAR(codebook_size=12, num_tokens=8, text_length=8, depth=1, ngram_buckets=16, **SIZES)
    with pytest.raises(ValueError, match="a TextAR reads other conditions than a FlexARClass"):
        generate(make_long_model(), IndependentDrafter(text))


@pytest.mark.parametrize("make", [make_text_model, make_long_model, tiny_target])
def test_an_early_exit_is_the_first_blocks_and_the_adapter(make) -> None:
    model = make()
    adapter = EarlyExitAdapter.for_target(model, 1).eval()
    short = with_early_exit(model, adapter)
    condition = model.encode_text(["a", "b", "c"]) if isinstance(model, TextAR) else LABELS
    indices = torch.randint(model.codebook_size, (3, model.num_tokens))
    depth = len(model.blocks)
    with torch.no_grad():
        untrained = short(condition, indices)  # passes the stream as it is
        model.blocks, blocks = model.blocks[:1], model.blocks
        torch.testing.assert_close(untrained, model(condition, indices))
        model.blocks = blocks
        torch.nn.init.normal_(adapter.attn.proj.weight)
        assert not torch.allclose(short(condition, indices), untrained)
    assert len(model.blocks) == depth and len(short.blocks) == 2
    assert short.token_embed is model.token_embed


def test_only_the_adapter_learns(target) -> None:
    model = tiny_target().requires_grad_(False)
    adapter = EarlyExitAdapter.for_target(model, 1)
    adapter.requires_grad_(True)
    with_early_exit(model, adapter)(LABELS, torch.zeros(3, 4, dtype=torch.int64)).sum().backward()
    assert adapter.attn.proj.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_survives_saving(target, tmp_path) -> None:
    adapter = EarlyExitAdapter.for_target(target, 1)
    torch.nn.init.normal_(adapter.attn.proj.weight)
    adapter.save_pretrained(tmp_path)
    again = EarlyExitAdapter.from_pretrained(tmp_path)
    images = [generate(target, EarlyExitDrafter(one.eval(), FixedLength(2))) for one in (adapter, again)]
    assert torch.equal(images[0].tokens.data, images[1].tokens.data)
    assert torch.equal(images[0].statistics.row_passes, images[1].statistics.row_passes)


def test_an_adapter_must_fit_its_target(target) -> None:
    for num_blocks in (0, -1):
        with pytest.raises(ValueError, match="num_blocks must be at least 1"):
            EarlyExitAdapter.for_target(target, num_blocks)
    with pytest.raises(
        ValueError, match=r"num_blocks must be in 1\.\.1 for a LlamaGenClass of 2 blocks, got 2"
    ):
        EarlyExitAdapter.for_target(target, 2)
    for size, value in {"codebook_size": 5, "dim": 32, "num_heads": 4}.items():
        other = {"codebook_size": 4, "dim": 16, "num_heads": 2, "num_blocks": 1} | {size: value}
        with pytest.raises(ValueError, match=f"made for {size} {value}, this LlamaGenClass has"):
            generate(target, EarlyExitDrafter(EarlyExitAdapter(**other)))
    sizes = {"codebook_size": 4, "num_tokens": 4, "num_classes": 3, "depth": 2} | SIZES
    grouped = LlamaGenClass(**sizes, num_kv_heads=1)
    with pytest.raises(ValueError, match="shares heads of keys and values"):
        EarlyExitAdapter.for_target(grouped, 1)


def test_a_coupled_draw_follows_the_new_law_and_keeps_all_that_it_can() -> None:
    count = 40_000
    old, new = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.3, 0.1, 0.4])
    stream = BatchStream(count, 0)
    tokens = torch.searchsorted(old.cumsum(0), stream.uniform(1), right=True).clamp(max=3)
    laws = [law.expand(count, 1, -1) for law in (old, new)]
    is_old = torch.ones(count, 1, dtype=torch.bool)
    drawn = maximal_coupling(tokens, *laws, is_old, stream.uniform(1, 2))
    torch.testing.assert_close(drawn[:, 0].bincount(minlength=4) / count, new, atol=0.01, rtol=0)
    assert float((drawn == tokens).float().mean()) == pytest.approx(
        0.6, abs=0.01
    )  # one less the total variation
    fresh = maximal_coupling(tokens, *laws, ~is_old, stream.uniform(1, 2))
    torch.testing.assert_close(fresh[:, 0].bincount(minlength=4) / count, new, atol=0.01, rtol=0)
    assert float((fresh == tokens).float().mean()) == pytest.approx(float(old @ new), abs=0.01)


def test_equal_laws_keep_every_draft() -> None:
    tokens = torch.tensor([[0, 1, 2]])
    laws = torch.tensor([0.2, 0.5, 0.3]).expand(1, 3, -1)
    is_old = torch.ones(1, 3, dtype=torch.bool)
    drawn = maximal_coupling(tokens, laws, laws.clone(), is_old, torch.full((1, 3, 2), 0.999))
    assert torch.equal(drawn, tokens)


@pytest.mark.parametrize("coupled", [True, False])
def test_a_target_that_ignores_its_tokens_accepts_its_own_drafts(coupled: bool) -> None:
    """What it thought of a position one pass ago is then what it thinks now; only what was never read is rejected."""
    model = make_long_model()
    with torch.no_grad():
        model.token_embed.weight.zero_()
    drafts = JacobiDrafter(7, coupled=coupled, opening="uniform")
    result = generate(model, drafts, sampling=SamplingParams(top_k=2))
    assert result.statistics.row_passes.max() <= 3 and result.statistics.draft_passes == 0


def test_windows_and_openings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="a window has at least 1 token, got 0"):
        JacobiDrafter(0)
    with pytest.raises(ValueError, match="unknown opening 'random'; choose one of repeat, uniform"):
        JacobiDrafter(opening="random")
