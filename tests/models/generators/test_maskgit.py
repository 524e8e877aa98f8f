from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok.models.generators.maskgit import PRESETS, MaskGIT, MaskGITBert, MaskGITUViT

SIZES = {"codebook_size": 24, "num_classes": 5, "num_tokens": 8, "dim": 32, "num_heads": 4, "mlp_dim": 64}


def tiny(kind: type[MaskGIT]) -> MaskGIT:
    torch.manual_seed(0)
    model = kind(**SIZES, depth=2 if kind is MaskGITUViT else 3).eval()
    with torch.no_grad():  # far from the nearly linear start, so that mistakes show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=[MaskGITBert, MaskGITUViT], ids=["bert", "uvit"])
def model(request: pytest.FixtureRequest) -> MaskGIT:
    return tiny(request.param)


def batch(model: MaskGIT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(model.codebook_size + 1, (3, model.num_tokens), generator=generator)
    return indices, torch.tensor([0, 4, 2])


def test_both_guidance_branches_in_one_batch_equal_two_forwards(model: MaskGIT) -> None:
    indices, labels = batch(model)
    null = torch.full_like(labels, model.null_label)
    both = model(indices.repeat(2, 1), torch.cat([labels, null]))
    assert both.shape == (6, model.num_tokens, model.codebook_size)
    torch.testing.assert_close(
        both, torch.cat([model(indices, labels), model(indices, null)]), atol=1e-5, rtol=0
    )
    assert not torch.allclose(both[:3], both[3:], atol=1e-2)  # the class matters


def test_every_position_sees_every_other(model: MaskGIT) -> None:
    indices, labels = batch(model)
    changed = indices.clone()
    changed[:, -1] = (indices[:, -1] + 1) % model.codebook_size
    difference = (model(indices, labels) - model(changed, labels)).abs().amax(dim=-1)
    assert (difference > 1e-5).all()


def test_gradients_reach_every_parameter_that_is_used(model: MaskGIT) -> None:
    model(*batch(model)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_dropout_acts_while_training_only() -> None:
    model = tiny(MaskGITBert)
    indices, labels = batch(model)
    assert torch.equal(model(indices, labels), model(indices, labels))
    model.train()
    assert not torch.equal(model(indices, labels), model(indices, labels))


def test_attention_dropout_acts_alone_too() -> None:
    model = MaskGITBert(**SIZES, depth=1, dropout=0.0, attention_dropout=0.5).train()
    assert not torch.equal(model(*batch(model)), model(*batch(model)))


def test_the_uvit_has_no_dropout() -> None:
    model = tiny(MaskGITUViT).train()
    assert torch.equal(model(*batch(model)), model(*batch(model)))


def test_save_and_load_are_bit_exact(model: MaskGIT, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in SIZES} == SIZES
    assert not loaded.training
    assert torch.equal(loaded(*batch(model)), model(*batch(model)))


def test_bfloat16_stays_near_float32(model: MaskGIT) -> None:
    exact = model(*batch(model))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(*batch(model))
    half = model.to(torch.bfloat16)(*batch(model))
    assert half.dtype == under_autocast.dtype == torch.bfloat16
    for logits in (half, under_autocast):
        assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_uvit_attends_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    from vistok.models.layers import attention as layer

    seen = set()
    original = layer.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
        result = original(q, k, v, mask)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(layer, "attention", spy)
    model = tiny(MaskGITUViT)
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch(model))
    assert seen == {torch.float32}


def test_long_skips_are_taken_last_in_first_out() -> None:
    model = MaskGITUViT(**SIZES, depth=4).eval()
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    for block in model.in_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    for skip in model.skips:
        skip.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    model(*batch(model))
    dim = SIZES["dim"]
    assert torch.equal(inputs[0][..., dim:], outputs[-1])
    assert torch.equal(inputs[1][..., dim:], outputs[0])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    kind, sizes = PRESETS[name]
    with torch.device("meta"):
        model = kind(**sizes)
    assert model.num_tokens == int(name.rsplit("-", 1)[1])
    parameters = {32: 177_202_432, 64: 177_227_008, 128: 294_990_848, 256: 177_374_464}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters[model.num_tokens]


def test_wrong_shapes_are_named(model: MaskGIT) -> None:
    indices, labels = batch(model)
    with pytest.raises(ValueError, match=r"takes indices \[b 8\], got \[3, 7\]"):
        model(indices[:, 1:], labels)
    with pytest.raises(ValueError, match=r"class_labels must be \[3\], got \[2\]"):
        model(indices, labels[:2])


def test_an_odd_uvit_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="must be even, got 3"):
        MaskGITUViT(**SIZES, depth=3)
