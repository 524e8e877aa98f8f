"""Normalisation layers shared by several models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019), in float32 or wider; returns the dtype of its input.

    Args:
        dim: width.
        eps: added to the mean square.
        weight_after_cast: multiply by the weight in the dtype of the input, as LLaMA does, instead of before the result
            is cast to it; the same in float32.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, weight_after_cast: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight_after_cast = weight_after_cast
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[... d]` -> `[... d]`."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.weight_after_cast:
            wide = wide.to(hidden_states.dtype)
        return (wide * self.weight.to(wide.dtype)).to(hidden_states.dtype)
