"""Sequences of different lengths as one row, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first `lengths[i]` positions of each row, one row after another.

    Args:
        padded: `[b n ...]`; what lies beyond a row's length is never read, forward or backward.
        lengths: one number in `0..n` per row, on the host, so that nothing waits for the device.

    Returns:
        `[1 sum(lengths) ...]`, for an attention with `PackedMask(lengths)`.

    Raises:
        ValueError: not one length per row, or one beyond `n`.
    """
    b, n = padded.shape[:2]
    if len(lengths) != b or max(lengths, default=0) > n:
        raise ValueError(f"{b} rows of {n} positions have no lengths {list(lengths)}")
    return padded.flatten(0, 1)[_places(lengths, n).to(padded.device)][None]


def unpack(packed: Tensor, lengths: Sequence[int], num_positions: int | None = None) -> Tensor:
    """Inverse of `pack`: `[1 sum(lengths) ...]` -> `[b n ...]` with zeros as padding; `n` is the longest by default."""
    n = max(lengths, default=0) if num_positions is None else num_positions
    padded = packed.new_zeros(len(lengths) * n, *packed.shape[2:])
    padded[_places(lengths, n).to(packed.device)] = packed[0]
    return padded.unflatten(0, (len(lengths), n))


def _places(lengths: Sequence[int], num_positions: int) -> Tensor:
    """Where the packed positions lie in the padded rows, laid end to end."""
    starts = [row * num_positions for row in range(len(lengths))]
    ranges = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
