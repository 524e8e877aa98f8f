"""The Triton kernels as an operator that `torch.compile` keeps whole, so that they are traced with and without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, Tensor? ancestors, "
    "Tensor? cos, Tensor? sin, Tensor? keep, float? scale) -> Tensor"
)


@torch.library.custom_op("vistok::decode_attention", mutates_args=("keys", "values"), schema=_SCHEMA)
def decode_attention_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    keep: Tensor | None,
    scale: float | None,
) -> Tensor:
    """`triton_decode_attention`, its rotation as two tensors."""
    from vistok.kernels.decode_attention.triton import triton_decode_attention

    rotation = None if cos is None or sin is None else (cos, sin)
    return triton_decode_attention(q, k, v, keys, values, lengths, ancestors, rotation, keep, scale)


@decode_attention_operator.register_fake
def _like_queries(q: Tensor, *others: object) -> Tensor:
    return q.new_empty(q.shape)
