"""Batched augmentations of images `[b 3 H W]` in [-1, 1], each drawn from an explicit generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied. Probabilities are per image; the zero instance changes nothing."""

    flip: float = 0.0  # probability of a horizontal flip
    affine: float = 0.0  # probability of a random rotation, scale and shift
    max_rotation: float = 10.0  # degrees
    max_zoom: float = 0.15  # scale is uniform in 1 +- this
    max_shift: float = 0.08  # of the image side
    hue: float = 0.0  # probability of a random rotation of the hue


def augment(images: Tensor, options: Augmentation, image_size: int, generator: torch.Generator) -> Tensor:
    """Varied copies of `images [b 3 H W]`, resized to `[b 3 image_size image_size]`; the background is white."""
    angles = (torch.rand(len(images), generator=generator) * 2 - 1) * math.pi
    hit = torch.rand(len(images), generator=generator) < options.hue
    images = rotate_hue(images, torch.where(hit, angles, 0.0))
    images = _affine(images, options, generator)
    flip = torch.rand(len(images), generator=generator) < options.flip
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if images.shape[-1] != image_size:
        images = F.interpolate(images, size=(image_size, image_size), mode="bicubic", antialias=True)
    return images.clamp(-1, 1)


def _affine(images: Tensor, options: Augmentation, generator: torch.Generator) -> Tensor:
    if options.affine == 0:
        return images
    hit, rotation, zoom, shift_x, shift_y = torch.rand(5, len(images), generator=generator) * 2 - 1
    hit = (hit + 1) / 2 < options.affine
    angle = rotation * math.radians(options.max_rotation) * hit
    scale = 1 / (1 + zoom * options.max_zoom * hit)
    shift_x, shift_y = (2 * options.max_shift * shift * hit for shift in (shift_x, shift_y))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    where = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, where, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
    return torch.where(hit[:, None, None, None], moved, images)


def rotate_hue(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate colours about the grey axis by `angles [b]` in radians; brightness is kept, [-1, 1] is enforced."""
    cos, sin = angles.cos(), angles.sin()
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    row = torch.stack([cos + third, third - root, third + root], dim=1)  # [b 3], rotation about (1, 1, 1)
    matrix = torch.stack([row, row.roll(1, dims=1), row.roll(2, dims=1)], dim=1)  # [b 3 3]
    return torch.einsum("brc,bchw->brhw", matrix, images).clamp(-1, 1)
