"""Rotary position embeddings over any number of axes (Su et al. 2021; two axes as in LlamaGen, Sun et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [n d/2] or [b 1 n d/2] each


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


def rotate(hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels (2p, 2p + 1) of queries or keys, in float32 or wider; returns the dtype of its input.

    Args:
        hidden_states: `[b h n d]`.
        cos, sin: `[n d/2]`, from `axial_rope`, or `[b 1 n d/2]` where the rows have positions of their own.

    Returns:
        `[b h n d]`.
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(dim=-1)  # [b h n d/2] each
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(hidden_states.dtype)
