"""Keys and values of all positions of an image, for evaluations that compute only some of them anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.models.layers.layer_cache import LayerCache


class ContextLayer(LayerCache):
    """Keys and values of one layer, `[b h 1+n+1 d]`: of the class, of all positions, and room for padding.

    Args:
        keys, values: the storage.
        slots: `[b k]` int64, where a block belongs; `None`: it is that of the class and of all positions.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor | None = None) -> None:
        super().__init__(keys, values)
        self.length = keys.shape[2] - 1
        self.slots = slots

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a block `[b h k d]` in its slots; returns all keys and values but the padding, `[b h 1+n d]`."""
        if self.slots is None:
            self.keys[:, :, : self.length] = keys
            self.values[:, :, : self.length] = values
            return keys, values
        slots = self.slots[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, slots, keys.to(self.keys.dtype))
        self.values.scatter_(2, slots, values.to(self.values.dtype))
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Evaluation:
    """What one evaluation of a masked generator computes, and what it sees of earlier ones.

    Args:
        layers: keys and values, which the evaluation brings up to date.
        slots: `[b 1+k]` int64: 0 is the class, `1 + i` position i, `1 + n` padding; `None`: all but padding.
    """

    def __init__(self, layers: list[ContextLayer], slots: Tensor | None) -> None:
        self.layers = layers
        self.slots = slots

    def select(self, sequence: Tensor) -> Tensor:
        """What belongs to the class and to all positions, `[b 1+n ...]` -> that of `slots`, `[b 1+k ...]`.

        Padding takes the last position's; nobody sees what it becomes.
        """
        if self.slots is None:
            return sequence
        rows = torch.arange(len(sequence), device=sequence.device)[:, None]
        return sequence[rows, self.slots.clamp_max(sequence.shape[1] - 1)]


class ContextCache:
    """Keys and values of the class and of all positions in every layer, allocated once.

    Args:
        depth: number of layers.
        batch_size, num_heads, num_tokens, head_dim: shape of each layer's keys and values.
        dtype, device: of the storage.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch_size: int,
        num_heads: int,
        num_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_tokens = num_tokens
        shape = (2, depth, batch_size, num_heads, 1 + num_tokens + 1, head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)

    def evaluate_all(self, batch_size: int) -> Evaluation:
        """An evaluation of everything, for the first rows."""
        return Evaluation(self._layers(batch_size, None), None)

    def evaluate(self, positions: Tensor) -> Evaluation:
        """An evaluation of the class and of some positions, for as many of the first rows.

        Those evaluated see each other and, of all others, what was kept.

        Args:
            positions: `[b k]` int64, different ones in each row; `num_tokens` is padding, where rows have fewer.
        """
        slots = F.pad(1 + positions, (1, 0))
        return Evaluation(self._layers(len(positions), slots), slots)

    def _layers(self, batch_size: int, slots: Tensor | None) -> list[ContextLayer]:
        if batch_size > self.keys.shape[1]:
            raise ValueError(f"the cache has {self.keys.shape[1]} rows, {batch_size} were asked for")
        return [
            ContextLayer(keys[:batch_size], values[:batch_size], slots)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
