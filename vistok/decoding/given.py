"""Tokens that are known before generation: inpainting and outpainting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Given:
    """Tokens that stay as they are; the generator decides the others.

    Args:
        indices: `[b n]` int64; read where `keep` is `True`.
        keep: `[b n]` boolean.

    Raises:
        ValueError: a wrong shape or dtype.
    """

    indices: Tensor
    keep: Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.dtype != torch.int64:
            raise ValueError(
                f"given indices must be int64 [b n], got {self.indices.dtype} {list(self.indices.shape)}"
            )
        if self.keep.dtype != torch.bool or self.keep.shape != self.indices.shape:
            raise ValueError(
                f"keep must be boolean {list(self.indices.shape)}, one entry per token, "
                f"got {self.keep.dtype} {list(self.keep.shape)}"
            )

    def check(self, batch_size: int, num_tokens: int, codebook_size: int) -> None:
        """Raises ValueError unless these are tokens of `batch_size` images of one generator."""
        if self.indices.shape != (batch_size, num_tokens):
            raise ValueError(
                f"given tokens must be [{batch_size} {num_tokens}], got {list(self.indices.shape)}"
            )
        kept = self.indices[self.keep]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < codebook_size:
            raise ValueError(
                f"given token ids must lie in 0..{codebook_size - 1}, got {int(kept.min())} to {int(kept.max())}"
            )

    def to(self, device: torch.device) -> Given:
        """As `Tensor.to`."""
        return Given(self.indices.to(device), self.keep.to(device))

    def put(self, indices: Tensor, positions: Tensor) -> Tensor:
        """Drawn tokens `[b k]` of some `positions [k]`, with those that are given in their place."""
        return torch.where(self.keep[:, positions], self.indices[:, positions], indices)
