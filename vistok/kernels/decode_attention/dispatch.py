"""The one entry to decode attention: `decode_attention(q, k, v, keys, values, lengths, backend="auto")`."""

from __future__ import annotations

from torch import Tensor

from vistok.kernels.decode_attention.reference import reference_decode_attention
from vistok.kernels.rotation import Rotation


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    ancestors: Tensor | None = None,
    rotation: Rotation | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append new positions to a cache, and attend from them to it."""
    return reference_decode_attention(q, k, v, keys, values, lengths, ancestors, rotation, keep, scale)
