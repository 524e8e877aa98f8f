from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vistok.models.generators.xar import XAR, noisy_context_loss
from vistok.models.heads.flow import logit_normal_times

SIZES: dict[str, Any] = {
    "latent_dim": 3,
    "latent_scale": 0.5,
    "num_classes": 5,
    "dim": 48,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 4,
    "mlp_dim": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
ORDERS = [  # every unit of the paper, and more, on grids of several shapes
    ("raster", "3x5", 15),
    ("cells-2", "4x6", 24),
    ("interleaved-2", "4x6", 24),
    ("scales", "1x1+2x1+3x5", 18),
    ("blocks-24", "4x6", 24),
    ("blocks-5", "3x5", 15),
    ("diagonal", "3x5", 15),
    ("random-1", "3x5", 15),
    ("cells-1", "2x2x2", 8),
    ("blocks-4", "sequence", 8),
]


def tiny(order: str = "cells-2", layout: str = "4x6", num_tokens: int = 24, **changes: Any) -> XAR:
    torch.manual_seed(0)
    model = XAR(order=order, layout=layout, num_tokens=num_tokens, **SIZES | changes).eval()
    with torch.no_grad():  # far from the nearly linear start, so that mistakes show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(model: XAR) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tokens, times, labels."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, model.num_tokens, model.latent_dim, generator=generator)
    times = torch.rand(3, model.order.num_steps, generator=generator)
    return noisy, times, torch.tensor([0, 4, model.null_label])


@pytest.mark.parametrize(("order", "layout", "num_tokens"), ORDERS)
@pytest.mark.parametrize("together", [True, False])
@torch.no_grad()
def test_steps_with_a_cache_give_what_the_whole_sequence_gives(
    order: str, layout: str, num_tokens: int, together: bool
) -> None:
    """A step's context goes into the cache with its tokens, as the release does, or before them."""
    model = tiny(order, layout, num_tokens)
    noisy, times, labels = batch(model)
    whole = model(noisy, times, labels)
    cache = model.new_cache(3)
    plan = model.order.plan()
    for step, positions in enumerate(plan):
        first = max(step - 1, 0) if together else step
        places = torch.cat(plan[first : step + 1])
        modulations = model.modulate(times[:, first : step + 1], labels)
        velocity = model.velocity(noisy[:, places], modulations, cache)
        torch.testing.assert_close(velocity, whole[:, positions], atol=2e-5, rtol=0)
        again = model.velocity(noisy[:, positions], model.modulate(times[:, step : step + 1], labels), cache)
        torch.testing.assert_close(again, velocity, atol=2e-5, rtol=0)
        if not together and step + 1 < len(plan):  # the next step's first call keeps this one
            modulations = model.modulate(times[:, step : step + 2], labels)
            model.velocity(noisy[:, torch.cat(plan[step : step + 2])], modulations, cache)
        everything = model.velocity(
            noisy[:, torch.cat(plan[: step + 1])], model.modulate(times[:, : step + 1], labels)
        )
        torch.testing.assert_close(everything, velocity, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("order", "layout", "num_tokens"), ORDERS)
def test_a_velocity_follows_from_its_own_and_earlier_steps_alone(
    order: str, layout: str, num_tokens: int
) -> None:
    model = tiny(order, layout, num_tokens)
    noisy, times, labels = batch(model)
    noisy.requires_grad_(True)
    velocity = model(noisy, times, labels)
    expected = model.order.context_mask()
    for position in range(0, num_tokens, 4):
        (grad,) = torch.autograd.grad(velocity[0, position].sum(), noisy, retain_graph=True)
        assert torch.equal(grad[0].abs().amax(dim=-1) > 0, expected[position])
        assert not grad[1:].any()


@torch.no_grad()
def test_every_step_has_its_own_time_and_every_image_its_class() -> None:
    model = tiny()
    noisy, times, labels = batch(model)
    before = model(noisy, times, labels)
    later = times.clone()
    later[0, 3] = 1 - later[0, 3]
    is_changed = (model(noisy, later, labels) - before).abs().amax(dim=-1) > 1e-4
    assert torch.equal(is_changed[0], model.order.decided_at() >= 3) and not is_changed[1:].any()
    other = model(noisy, times, torch.tensor([0, 1, model.null_label]))
    assert torch.equal(other[0], before[0]) and (other[1] - before[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_network_is_told_whole_thousandths() -> None:
    model = tiny()
    noisy, _, labels = batch(model)
    told, same, other = (model(noisy, torch.full((3, 6), time), labels) for time in (0.2801, 0.28, 0.2799))
    assert torch.equal(told, same) and not torch.equal(told, other)


def test_the_loss_is_that_of_noisy_contexts() -> None:
    model = tiny()
    latents, _, labels = batch(model)
    generator = torch.Generator().manual_seed(2)
    times = logit_normal_times(torch.randn(3, 6, generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    loss = noisy_context_loss(model, latents, labels, times, noise)
    noisy = torch.empty_like(latents)
    for step, positions in enumerate(model.order.plan()):
        share = times[:, step, None, None]
        noisy[:, positions] = (1 - share) * 0.5 * latents[:, positions] + share * noise[:, positions]
    expected = (model(noisy, times, labels) - (noise - 0.5 * latents)).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_save_and_load_are_bit_exact(tmp_path) -> None:
    model = tiny("scales", "1x1+2x2+4x4", 21)
    model.save_pretrained(tmp_path)
    loaded = XAR.from_pretrained(tmp_path)
    assert (loaded.order, loaded.layout, loaded.latent_scale) == (model.order, model.layout, 0.5)
    assert torch.equal(loaded(*batch(model)), model(*batch(model)))


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_acts_while_training_only(kind: str) -> None:
    model = tiny(**{kind: 0.5})
    assert torch.equal(model(*batch(model)), model(*batch(model)))
    model.train()
    assert not torch.equal(model(*batch(model)), model(*batch(model)))


@torch.no_grad()
def test_bfloat16_stays_near_float32() -> None:
    model = tiny()
    exact = model(*batch(model))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(*batch(model))
    half = model.to(torch.bfloat16)(*batch(model))
    assert half.dtype == under_autocast.dtype == torch.bfloat16
    for velocity in (half, under_autocast):
        assert (velocity.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 23}, "does not have 23 positions"),
        ({"order": "cells-4"}, "cannot be cut into cells of 4"),
        ({"order": "scales"}, "needs tokens in several scales"),
        ({"order": "cells"}, "unknown order 'cells'"),
        ({"num_heads": 8}, "multiple of 4, got 6"),
        ({"latent_scale": 0.0}, "latent_scale must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_wrong_inputs_are_named() -> None:
    model = tiny()
    noisy, times, labels = batch(model)
    with pytest.raises(ValueError, match=r"takes latents \[b 24 3\], got \[3, 24, 2\]"):
        model(noisy[..., :2], times, labels)
    with pytest.raises(ValueError, match=r"times must be \[3 6\].*got \[3, 24\]"):
        model(noisy, times.repeat(1, 4), labels)
    with pytest.raises(ValueError, match=r"class_labels must be \[3\], got \[2\]"):
        model(noisy, times, labels[:2])
    with pytest.raises(ValueError, match=r"must be in 0\.\.4, or 5 for none"):
        model(noisy, times, labels + 1)


@torch.no_grad()
def test_only_whole_steps_are_taken() -> None:
    model = tiny("scales", "1x1+2x1+3x5", 18)
    noisy, times, labels = batch(model)
    cache = model.new_cache(3)
    with pytest.raises(ValueError, match=r"2 tokens with 1 times were fed at step 0;.*\[1, 2, 15\]"):
        model.velocity(noisy[:, :2], model.modulate(times[:, :1], labels), cache)
    model.velocity(noisy[:, :3], model.modulate(times[:, :2], labels), cache)
    assert cache.length == 1
    with pytest.raises(ValueError, match=r"18 tokens with 3 times were fed at step 1;.*\[2, 15\]"):
        model.velocity(noisy, model.modulate(times, labels), cache)
