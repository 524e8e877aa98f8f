"""PSNR, SSIM and codebook usage against small computations of their own."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vistok.eval.reconstruction import CodebookUsage, evaluate_reconstruction, psnr, ssim
from vistok.tokens import Tokens


def noisy_pair(height: int = 13, width: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, height, width), generator=generator)
    noise = torch.randint(-30, 31, images.shape, generator=generator)
    return (images + noise).clamp(0, 255).to(torch.uint8), images.to(torch.uint8)


def ssim_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equations 13 to 16, window by window, for one channel."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (image[top : top + 11, left : left + 11].astype(np.float64) for image in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    return float(np.mean(values))


def test_ssim_follows_its_definition():
    images, reference = noisy_pair()
    expected = [
        np.mean([ssim_by_definition(images[b, c].numpy(), reference[b, c].numpy()) for c in range(3)])
        for b in range(2)
    ]
    np.testing.assert_allclose(ssim(images, reference).numpy(), expected, rtol=1e-9)
    assert 0.5 < expected[0] < 0.99  # noise that matters, so that constants and window matter


def test_ssim_of_equal_images_is_one():
    images, _ = noisy_pair()
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64))


def test_psnr_of_a_constant_difference():
    reference = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    images = reference.clone()
    images[0] += 10
    images[1] -= 50
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 50)]
    assert psnr(images, reference).tolist() == pytest.approx(expected)
    assert psnr(reference, reference).tolist() == [math.inf, math.inf]


def test_bad_pairs():
    images, reference = noisy_pair()
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(images, reference[:1])
    with pytest.raises(ValueError, match="uint8"):
        ssim(images.float(), reference)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(images[..., :10], reference[..., :10])


def test_codebook_usage_ignores_padding():
    usage = CodebookUsage(8)
    indices = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 7], [3, 6, 6, 6]])
    usage.add(Tokens(indices=indices, codebook_size=8, lengths=torch.tensor([4, 3, 1])))
    assert usage.share == pytest.approx(4 / 8)
    assert usage.entropy == pytest.approx(2)  # four codes, two of each
    assert (usage.num_images, usage.num_tokens) == (3, 8)


def test_continuous_tokens_have_no_usage():
    usage = CodebookUsage(None)
    usage.add(Tokens(latents=torch.zeros(2, 3, 4)))
    assert (usage.share, usage.entropy, usage.num_tokens) == (None, None, 6)


def test_evaluate_a_folder(tokenizer, folder_of):
    """The stand-in codes grey exactly at its 16 levels (0, 17, ... 255) and 4 too dark for 21."""
    folder = folder_of("pictures", [(34, 34, 34), (21, 21, 21), (21, 21, 21)], size=(40, 64))
    result = evaluate_reconstruction(tokenizer, folder, batch_size=2)
    assert result.psnr == math.inf
    (folder / "0000.png").unlink()
    result = evaluate_reconstruction(tokenizer, folder, batch_size=1)
    assert result.psnr == pytest.approx(20 * math.log10(255 / 4))
    assert (result.num_images, result.image_size, result.tokens_per_image) == (2, 32, 16)
    assert (result.codebook_usage, result.codebook_entropy) == (1 / 16, 0)
    assert json.loads(result.to_json())["rounding"] == "uint8, nearest; data range 255"


def test_evaluate_needs_images(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        evaluate_reconstruction(tokenizer, tmp_path)
