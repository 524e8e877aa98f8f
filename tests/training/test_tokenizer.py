"""The tokenizer's losses: dropped tails and the perceptual distance."""

from __future__ import annotations

import pytest
import torch

from vistok.training.perceptual import PerceptualLoss
from vistok.training.tokenizer import draw_lengths


def draw(tail_drop: float, count: int = 4000) -> torch.Tensor:
    return draw_lengths(count, 64, tail_drop, torch.Generator().manual_seed(0))


def test_no_tail_drop_keeps_every_token():
    assert bool((draw(0.0) == 64).all())


def test_dropped_lengths_are_log_uniform_from_one_to_all():
    lengths = draw(1.0)
    assert lengths.min() == 1 and lengths.max() == 64
    # every octave gets about a sixth: 4000 draws have a standard error of 0.6 %
    for low in (2, 4, 8, 16, 32):
        share = ((lengths >= low) & (lengths < 2 * low)).float().mean().item()
        assert share == pytest.approx(1 / 6, abs=0.05)


def test_tail_drop_is_the_share_of_shortened_images():
    assert (draw(0.4) < 64).float().mean().item() == pytest.approx(0.4, abs=0.04)


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss(64)


def picture() -> torch.Tensor:
    ramp = torch.linspace(-1, 1, 32)
    return torch.stack([ramp.expand(32, 32), ramp.expand(32, 32).T, -ramp.expand(32, 32)])[None]


def test_the_same_picture_is_at_distance_zero_and_blur_is_seen(perceptual):
    image = picture()
    noisy = (image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert perceptual(image, image) == 0
    assert perceptual(noisy, image) > 0.05


def test_only_the_reconstruction_gets_a_gradient(perceptual):
    image, target = picture().mul(0.5).requires_grad_(), picture().requires_grad_()
    perceptual(image, target).backward()
    assert image.grad is not None and bool(image.grad.abs().sum() > 0)
    assert target.grad is None and all(p.grad is None for p in perceptual.parameters())


def test_statistics_stay_those_of_imagenet(perceptual):
    assert not any(module.training for module in perceptual.train().modules())
