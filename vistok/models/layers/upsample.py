"""Twice the resolution and a 3x3 convolution: what the decoders of all convolutional autoencoders here do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UpsampleConv(nn.Conv2d):
    """`conv(interpolate(images, scale_factor=2, mode="nearest"))` with a 3x3 kernel and zero padding of 1.

    Of the nine pixels under the kernel at least two rows and two columns are copies, whose weights can be added up
    before: the pixels at even and odd rows and columns are four convolutions of 2x2 at the lower resolution (the idea of
    sub-pixel convolution, Shi et al. 2016, section 3.2), 4/9 of the products. That is how it is computed on a CPU, where
    the products take the time; the result differs by rounding. In lower precision than float32, where the sums of weights
    would be rounded, too, it is computed as it is written.

    Args:
        channels: of the images and of the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """`[b c h w]` -> `[b c 2h 2w]`."""
        if images.device.type != "cpu" or images.dtype not in (torch.float32, torch.float64):
            return super().forward(F.interpolate(images, scale_factor=2.0, mode="nearest"))
        height, width = images.shape[-2:]
        padded = F.pad(images, (1, 1, 1, 1))
        pixels = [
            F.conv2d(padded[:, :, row : row + height + 1, column : column + width + 1], part, self.bias)
            for row, kernel in enumerate(_halves(self.weight, dim=2))
            for column, part in enumerate(_halves(kernel, dim=3))
        ]  # 4 x [b c h w], those of even rows first
        return F.pixel_shuffle(torch.stack(pixels, dim=2).flatten(1, 2), 2)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A kernel of 3 along `dim` as the kernels of 2 that make even and odd pixels."""
    first, second, third = weight.split(1, dim=dim)
    return torch.cat([first, second + third], dim), torch.cat([first + second, third], dim)
