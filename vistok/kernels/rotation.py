"""The rotation of queries and keys by their positions (Su et al. 2021), given its angles."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [n d/2] or [b 1 n d/2] each


def rotate(hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels (2p, 2p + 1) of queries or keys, in float32 or wider; returns the dtype of its input.

    Args:
        hidden_states: `[b h n d]`.
        cos, sin: `[n d/2]`, as `axial_rope` makes them, or `[b 1 n d/2]` where the rows have positions of their own.

    Returns:
        `[b h n d]`.
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(dim=-1)  # [b h n d/2] each
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(hidden_states.dtype)
