"""The convolution at twice the resolution against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistok.models.layers.upsample import UpsampleConv
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.models.tokenizers.vqgan import VQGAN


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 2), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_convolution_of_repeated_pixels(size: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    conv = UpsampleConv(6).to(dtype)
    images = torch.randn(2, 6, *size, generator=generator).to(dtype)
    repeated = F.interpolate(images.double(), scale_factor=2.0, mode="nearest")
    exact = F.conv2d(repeated, conv.weight.double(), conv.bias.double(), padding=1)
    plain = F.conv2d(repeated.to(dtype), conv.weight, conv.bias, padding=1)
    budget = 2 * (plain - exact).abs().max() + 1e-6
    result = conv(images)
    assert result.dtype == dtype and result.shape == exact.shape
    assert (result - exact).abs().max() <= budget


def test_gradients_reach_the_weights_and_the_image() -> None:
    conv, images = UpsampleConv(3).double(), torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(conv, {"weight": weight}, (x,)), (images, conv.weight)
    )


def test_all_convolutional_decoders_use_it() -> None:
    kl = KLTokenizer(image_size=16, latent_channels=3, dims=(4, 8, 8), depth=1, num_groups=2)
    sizes = {"image_size": 16, "dim": 32, "dim_mults": (1, 1, 1), "depth": 1}
    for tokenizer in (kl, VQGAN(**sizes), MaskGITVQGAN(**sizes)):
        found = [module for module in tokenizer.modules() if isinstance(module, UpsampleConv)]
        assert len(found) == 2
        assert not [m for m in tokenizer.modules() if isinstance(m, nn.Upsample)]
