"""Rotary position embeddings over any number of axes (Su et al. 2021; two axes as in LlamaGen, Sun et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.rotation import Rotation, rotate

__all__ = ["Rotation", "axial_rope", "rotate"]


def axial_rope(coordinates: Tensor, head_dim: int, base: float = 10000.0) -> Rotation:
    """Cosines and sines of the rotation angles at some positions.

    The `head_dim / 2` pairs of channels are shared out evenly, the first axis first. With `a = head_dim / axes`, pair j
    of an axis turns by `coordinate * base ** (-2 j / a)`.

    Args:
        coordinates: `[n axes]`, where the tokens lie.
        head_dim: channels per head.
        base: longest wavelength over 2 pi.

    Returns:
        Two tensors `[n head_dim/2]` float32.

    Raises:
        ValueError: `head_dim` is not a multiple of twice the number of axes.
    """
    num_axes = coordinates.shape[-1]
    if head_dim % (2 * num_axes):
        raise ValueError(
            f"rotary positions over {num_axes} axes need a head_dim that is a multiple of {2 * num_axes}, got {head_dim}"
        )
    axis_dim = head_dim // num_axes
    powers = torch.arange(0, axis_dim, 2, device=coordinates.device, dtype=torch.float32) / axis_dim
    angles = coordinates[..., None].float() * base**-powers  # [n axes head_dim/axes/2]
    angles = angles.flatten(-2)
    return angles.cos(), angles.sin()
