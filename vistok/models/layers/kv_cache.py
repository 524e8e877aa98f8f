"""A statically allocated key-value cache that appends blocks and rolls back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, `[b h max_length d]`, filled up to `length`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block `[b h n d]` and return views of everything stored, `[b h length d]`.

        Raises:
            ValueError: the block does not fit, or has another number of rows.
        """
        if len(keys) != len(self.keys):
            raise ValueError(f"the cache has {len(self.keys)} rows, {len(keys)} came")
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} were asked for")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def narrow(self, batch_size: int) -> LayerCache:
        """The first rows, which share their storage; what either appends later does not count for the other."""
        view = LayerCache(self.keys[:batch_size], self.values[:batch_size])
        view.length = self.length
        return view


class KVCache:
    """One `LayerCache` per layer of a transformer, allocated once.

    Args:
        depth: number of layers.
        batch_size, num_heads, max_length, head_dim: shape of each layer's keys and values.
        dtype, device: of the storage.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, num_heads, max_length, head_dim)
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for _ in range(depth)
        ]
        self.max_length = max_length

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.layers[0].keys)

    def narrow(self, batch_size: int) -> KVCache:
        """The first rows as a cache of its own length that shares their storage."""
        view = copy.copy(self)
        view.layers = [layer.narrow(batch_size) for layer in self.layers]
        return view

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ValueError: `length` is negative or beyond what is stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}: {self.length} positions are stored")
        for layer in self.layers:
            layer.length = length
