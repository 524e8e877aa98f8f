"""FlexAR: both kinds of conditioning, cache, prefixes, saving."""

from __future__ import annotations

import pytest
import torch

from vistok import FlexARClass, FlexARText
from vistok.models.generators.base import Condition
from vistok.models.generators.flex_ar import NO_CLASS, FlexAR
from vistok.models.generators.text_features import TextFeatures

SMALL = {"codebook_size": 20, "num_tokens": 6, "dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}


def make_features(lengths: tuple[int, ...], dim: int = 12) -> TextFeatures:
    generator = torch.Generator().manual_seed(1)
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), max(lengths), dim, generator=generator), keep)


def make_class_model() -> FlexARClass:
    torch.manual_seed(0)
    model = FlexARClass(num_classes=5, qk_norm="rms", **SMALL).eval()
    with torch.no_grad():
        model.class_embed.weight.mul_(20)
    return model


def make_text_model() -> FlexARText:
    torch.manual_seed(0)
    model = FlexARText(text_dim=12, norm="layer", qkv_bias=True, bias=True, **SMALL).eval()
    with torch.no_grad():
        for part in ("text_proj.fc1", "text_proj.fc2"):
            model.get_submodule(part).weight.mul_(20)
    return model


@pytest.fixture(params=["class", "text"])
def case(request) -> tuple[FlexAR, Condition]:
    """A model and conditions of two images."""
    if request.param == "class":
        return make_class_model(), torch.tensor([3, 1])
    return make_text_model(), make_features((3, 5))


@pytest.fixture
def indices() -> torch.Tensor:
    return torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_cached_steps_equal_the_training_pass(case, indices) -> None:
    model, condition = case
    cache = model.new_cache(2)
    logits = [model.prefill(condition, cache)]
    logits += [model.step(indices[:, i : i + 1], cache) for i in range(5)]
    expected = model(condition, indices)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_rolled_back_cache_continues_as_if_nothing_had_been_appended(case, indices) -> None:
    model, condition = case
    cache = model.new_cache(2)
    model.prefill(condition, cache)
    expected = model.step(indices[:, 0:1], cache)
    cache.rollback(1)
    assert not torch.allclose(model.step(indices[:, 1:2], cache), expected)
    cache.rollback(1)
    torch.testing.assert_close(model.step(indices[:, 0:1], cache), expected)


@torch.inference_mode()
def test_logits_follow_from_the_condition_and_the_tokens_before(case, indices) -> None:
    model, condition = case
    logits = model(condition, indices)
    torch.testing.assert_close(model(condition, indices[:, :3]), logits[:, :3], atol=1e-5, rtol=0)
    changed = indices.clone()
    changed[:, 3:] = (indices[:, 3:] + 1) % 20
    after = model(condition, changed)
    assert torch.equal(after[:, :4], logits[:, :4]) and not torch.allclose(after[:, 4:], logits[:, 4:])


@torch.inference_mode()
def test_a_small_cache_is_for_few_tokens(case, indices) -> None:
    model, condition = case
    cache = model.new_cache(2, num_tokens=2)
    model.prefill(condition, cache)
    model.step(indices[:, 0:1], cache)
    with pytest.raises(ValueError, match="holds 2 positions"):
        model.step(indices[:, 1:2], cache)


@pytest.mark.parametrize("shape", [(2, 0), (2, 7), (2,)])
def test_wrong_numbers_of_tokens_are_refused(case, shape: tuple) -> None:
    model, condition = case
    with pytest.raises(ValueError, match=r"indices must be \[b n\] with n in 1\.\.6"):
        model(condition, torch.zeros(shape, dtype=torch.int64))


@torch.inference_mode()
def test_save_and_load_are_bit_exact(case, indices, tmp_path) -> None:
    model, condition = case
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert torch.equal(loaded(condition, indices), model(condition, indices))


def test_every_parameter_gets_a_gradient(case, indices) -> None:
    model, condition = case
    model(condition, indices).log_softmax(dim=-1)[..., 0].sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.inference_mode()
def test_no_class_is_the_zero_vector_and_labels_stay_as_they_are(indices) -> None:
    model = make_class_model()
    labels = torch.tensor([NO_CLASS, 3])
    without = model(labels, indices)
    assert labels.tolist() == [NO_CLASS, 3]
    torch.testing.assert_close(without[1], model(torch.tensor([3, 3]), indices)[1])
    model.class_embed.weight.zero_()
    torch.testing.assert_close(without[0], model(torch.tensor([0, 0]), indices)[0])


@pytest.mark.parametrize("label", [5, -2])
def test_classes_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(ValueError, match=r"class labels must be in 0\.\.4, or -1 for none"):
        make_class_model().embed_class(torch.tensor([0, label]))


@torch.inference_mode()
def test_what_is_masked_in_a_text_does_not_matter(indices) -> None:
    model, features = make_text_model(), make_features((3, 5))
    expected = model(features, indices)
    poisoned = features.features.masked_fill(~features.keep[..., None], 1e4)
    torch.testing.assert_close(model(TextFeatures(poisoned, features.keep), indices), expected)
    alone = TextFeatures(features.features[:1, :3], features.keep[:1, :3])
    torch.testing.assert_close(model(alone, indices[:1]), expected[:1], atol=1e-5, rtol=0)
    assert not torch.allclose(model(make_features((5, 3)), indices), expected)


def test_features_of_another_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="16 wide, this model reads 12: those of google/flan-t5-xl"):
        make_text_model().read_text(make_features((2,), dim=16))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 32 is not a multiple of num_heads 3"):
        FlexARClass(**SMALL | {"num_heads": 3})
    with pytest.raises(ValueError, match="a norm is 'rms' or 'layer', got 'batch'"):
        FlexARClass(**SMALL, norm="batch")
    with pytest.raises(ValueError, match="text_gelu must be 'tanh' or 'none'"):
        FlexARText(**SMALL, text_gelu="sigmoid")
