"""LlamaGen: conditions, cache, positions, padding, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vistok import LlamaGenClass, LlamaGenText
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Condition
from vistok.models.generators.llamagen import GridTransformer, LlamaGen
from vistok.models.generators.text_features import TextFeatures
from vistok.models.layers.norm import RMSNorm

SMALL = {"codebook_size": 20, "num_tokens": 9, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
TEXT = {"text_dim": 12, "max_text_length": 6}


def make_features(lengths: tuple[int, ...], dim: int = 12) -> TextFeatures:
    """Texts of these lengths, with garbage in the padding."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), max(lengths), dim, generator=generator), keep)


def randomise(model: GridTransformer) -> GridTransformer:
    """Weights large enough for every part to matter; a fresh head says nothing at all."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


def make_case(kind: str, **changes: int) -> tuple[LlamaGen, Condition]:
    """A model, and conditions of two images."""
    if kind == "class":
        return randomise(LlamaGenClass(num_classes=5, **SMALL | changes)), torch.tensor([3, 5])
    return randomise(LlamaGenText(**TEXT, **SMALL | changes)), make_features((2, 5))


@pytest.fixture(params=["class", "text"])
def case(request: pytest.FixtureRequest) -> tuple[LlamaGen, Condition]:
    return make_case(request.param)


def make_indices(num_tokens: int) -> torch.Tensor:
    return torch.randint(20, (2, num_tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("changes", [{}, {"num_tokens": 25}, {"num_tokens": 1}, {"num_kv_heads": 1}])
@torch.inference_mode()
def test_cached_steps_equal_the_training_pass(kind: str, changes: dict) -> None:
    model, condition = make_case(kind, **changes)
    indices = make_indices(model.num_tokens)
    cache = model.new_cache(2)
    logits = [model.prefill(condition, cache)]
    logits += [model.step(indices[:, i : i + 1], cache) for i in range(model.num_tokens - 1)]
    expected = model(condition, indices)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_several_tokens_at_once_equal_one_by_one(case) -> None:
    model, condition = case
    indices = make_indices(9)
    cache = model.new_cache(2)
    logits = [model.prefill(condition, cache)]
    logits += [model.step(part, cache) for part in indices[:, :8].split([3, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(condition, indices), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_rolled_back_cache_continues_as_if_nothing_had_been_appended(case) -> None:
    model, condition = case
    indices = make_indices(9)
    cache = model.new_cache(2)
    model.prefill(condition, cache)
    length = cache.length
    expected = model.step(indices[:, :2], cache)
    cache.rollback(length)
    assert not torch.allclose(model.step(indices[:, 2:4], cache), expected)
    cache.rollback(length)
    torch.testing.assert_close(model.step(indices[:, :2], cache), expected)


@torch.inference_mode()
def test_logits_follow_from_the_condition_and_the_tokens_before(case) -> None:
    model, condition = case
    indices = make_indices(9)
    logits = model(condition, indices)
    torch.testing.assert_close(model(condition, indices[:, :4]), logits[:, :4], atol=1e-5, rtol=0)
    for position in range(9):
        changed = indices.clone()
        changed[:, position] = (indices[:, position] + 1) % 20
        differs = (model(condition, changed) != logits).any(dim=-1)  # [b n]
        assert not differs[:, : position + 1].any() and differs[:, position + 1 :].all()
    other = torch.tensor([2, 0]) if isinstance(condition, torch.Tensor) else make_features((5, 2))
    assert (model(other, indices) != logits).any(dim=-1).all()


@torch.inference_mode()
def test_positions_are_rows_and_columns(case) -> None:
    model, _ = case
    cos, sin = model.rope()
    length = model.prefix.length
    assert not cos[:length].any() and not sin[:length].any()
    # heads of 8: two pairs for the row, two for the column; the first pair of each turns by 1 per step
    row, column = 2, 1
    angles = torch.tensor([row, row * 0.01, column, column * 0.01])
    torch.testing.assert_close(cos[length + 3 * row + column], angles.cos())
    torch.testing.assert_close(sin[length + 3 * row + column], angles.sin())


@torch.inference_mode()
def test_padding_of_a_text_changes_nothing() -> None:
    model, features = make_case("text")
    indices = make_indices(9)
    expected = model(features, indices)
    poisoned = TextFeatures(features.features.masked_fill(~features.keep[..., None], 1e4), features.keep)
    torch.testing.assert_close(model(poisoned, indices), expected, atol=1e-5, rtol=0)
    assert torch.equal(model(features.left_padded(6), indices), expected)
    alone = TextFeatures(features.features[:1, :2], features.keep[:1, :2])
    torch.testing.assert_close(model(alone, indices[:1]), expected[:1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_the_null_text_has_the_padding_of_the_text_it_stands_for() -> None:
    model, features = make_case("text")
    null = model.null_condition_for(features)
    assert null.keep.tolist() == features.left_padded(6).keep.tolist()
    assert torch.equal(null.features[1], model.prefix.null_text[:6])
    indices, cut = make_indices(9), model.prefix.null_text[None, 4:6]
    short = TextFeatures(cut, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(model(null, indices)[:1], model(short, indices[:1]), atol=1e-5, rtol=0)
    assert model.null_condition(3).keep.all()


def test_the_null_text_is_stored_and_not_trained(tmp_path) -> None:
    model, features = make_case("text")
    assert model.state_dict()["prefix.null_text"].shape == (120, 12)
    assert "prefix.null_text" not in dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = LlamaGenText.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        indices = make_indices(9)
        torch.testing.assert_close(
            loaded(loaded.null_condition_for(features), indices),
            model(model.null_condition_for(features), indices),
        )


@pytest.mark.parametrize("kind", ["class", "text"])
def test_guided_images_do_not_depend_on_the_batch(kind: str) -> None:
    model, condition = make_case(kind)
    together = generate_ordered(
        model, condition, streams=ImageStreams.from_seeds([0, 1]), guidance=ConstantGuidance(3.0)
    )
    second = condition[1:] if kind == "class" else TextFeatures(condition.features[1:], condition.keep[1:])
    alone = generate_ordered(
        model, second, streams=ImageStreams.from_seeds([1]), guidance=ConstantGuidance(3.0)
    )
    assert torch.equal(together.data[1], alone.data[0])


@torch.inference_mode()
def test_logits_are_float32_whatever_the_weights_are(case) -> None:
    model, condition = case
    indices = make_indices(9)
    expected = model(condition, indices)
    model.to(torch.bfloat16)
    cache = model.new_cache(2)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    first = model.prefill(condition, cache)
    second = model.step(indices[:, :1], cache)
    assert first.dtype == second.dtype == model(condition, indices).dtype == torch.float32
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected[:, :2], atol=0.1, rtol=0)


def test_the_weight_of_a_norm_is_applied_in_the_dtype_of_the_input() -> None:
    hidden_states = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    norm, plain = RMSNorm(16, weight_after_cast=True), RMSNorm(16)
    with torch.no_grad():
        for parameter in (norm.weight, plain.weight):
            parameter.copy_(torch.linspace(0.3, 2.1, 16))
    assert torch.equal(norm(hidden_states), plain(hidden_states))
    low = hidden_states.bfloat16()
    norm, plain = norm.bfloat16(), plain.bfloat16()
    normalised = F.rms_norm(low.float(), (16,), eps=1e-6).bfloat16()
    assert torch.equal(norm(low), normalised * norm.weight)
    assert not torch.equal(norm(low), plain(low))


def test_every_parameter_gets_a_gradient_and_dropout_only_acts_in_training(case) -> None:
    model, condition = case
    indices = make_indices(9)
    model(condition, indices).log_softmax(dim=-1)[..., 0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    for dropout in ("token_dropout", "residual_dropout", "mlp_dropout"):
        other = type(model)(**{**model.config, dropout: 0.5})
        other.load_state_dict(model.state_dict())
        assert not torch.equal(other.train()(condition, indices), other(condition, indices))
        assert torch.equal(other.eval()(condition, indices), model(condition, indices))


def test_a_fresh_model_knows_nothing() -> None:
    model = LlamaGenClass(num_classes=5, **SMALL)
    assert not model(torch.tensor([1, 2]), make_indices(9)).any()


@torch.inference_mode()
def test_a_small_cache_is_for_few_tokens(case) -> None:
    model, condition = case
    indices = make_indices(9)
    cache = model.new_cache(2, num_tokens=2)
    model.prefill(condition, cache)
    model.step(indices[:, :1], cache)
    most = model.prefix.length + 2
    with pytest.raises(ValueError, match=f"holds {most} positions, {most + 1} were asked for"):
        model.step(indices[:, 1:3], cache)


@pytest.mark.parametrize("shape", [(2, 0), (2, 10), (2,)])
def test_wrong_numbers_of_tokens_are_refused(case, shape: tuple) -> None:
    model, condition = case
    with pytest.raises(ValueError, match=r"indices must be \[b n\] with n in 1\.\.9, got"):
        model(condition, torch.zeros(shape, dtype=torch.int64))


def test_wrong_numbers_of_conditions_are_refused(case) -> None:
    model, condition = case
    with pytest.raises(ValueError, match="2 conditions came with the tokens of 3 images"):
        model(condition, torch.zeros(3, 9, dtype=torch.int64))


@pytest.mark.parametrize("label", [6, -1])
def test_classes_out_of_range_are_refused(label: int) -> None:
    model, _ = make_case("class")
    with pytest.raises(
        ValueError, match=rf"class labels must be in 0\.\.4, or 5 for none; got \[0, {label}\]"
    ):
        model(torch.tensor([0, label]), make_indices(9))


def test_texts_that_do_not_fit_are_refused() -> None:
    model, _ = make_case("text")
    with pytest.raises(ValueError, match="a text has 7 tokens, this model reads at most 6"):
        model(make_features((7, 2)), make_indices(9))
    with pytest.raises(ValueError, match="16 wide, this model reads 12: those of google/flan-t5-xl"):
        model(make_features((2, 2), dim=16), make_indices(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 10}, "num_tokens 10 does not make a square grid; 9 and 16 do"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"num_heads": 3}, "dim 16 is not a multiple of num_heads 3"),
        ({"num_heads": 8}, "dim 16 and num_heads 8 make them 2 wide"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaGenClass(**SMALL | changes)


def test_longer_texts_than_the_null_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_text_length must be in 1\.\.120, got 121"):
        LlamaGenText(text_dim=12, max_text_length=121, **SMALL)
