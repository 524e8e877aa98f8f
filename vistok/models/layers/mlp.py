"""The gated MLP of LLaMA-style blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): `down(silu(gate x) * up x)`.

    Args:
        dim: width.
        mlp_dim: hidden width.
        bias: whether the three linear layers have one.
    """

    def __init__(self, dim: int, mlp_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, mlp_dim, bias=bias)
        self.up = nn.Linear(dim, mlp_dim, bias=bias)
        self.down = nn.Linear(mlp_dim, dim, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))
