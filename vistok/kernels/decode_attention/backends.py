"""Backends of decode attention: functions of the same arguments, and why one of them cannot run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vistok.kernels.decode_attention.composed import composed_decode_attention
from vistok.kernels.decode_attention.operator import decode_attention_operator
from vistok.kernels.decode_attention.reference import reference_decode_attention
from vistok.kernels.rotation import Rotation
from vistok.kernels.triton_support import triton_objections

MOST_NEW = 64  # positions of one call that the Triton kernel takes; they are one tile
MOST_CHANNELS = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None = None,
    rotation: Rotation | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    if torch.compiler.is_compiling():
        cos, sin = (None, None) if rotation is None else rotation
        return decode_attention_operator(q, k, v, keys, values, lengths, ancestors, cos, sin, keep, scale)
    from vistok.kernels.decode_attention.triton import triton_decode_attention

    return triton_decode_attention(q, k, v, keys, values, lengths, ancestors, rotation, keep, scale)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "triton": _run_triton,
    "torch": composed_decode_attention,
    "reference": reference_decode_attention,
}


def objections(name: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> list[str]:
    """Reasons why a backend cannot run this call; empty when it can."""
    if name != "triton":
        return []
    reasons = list(triton_objections(q.device))
    if len({x.dtype for x in (q, k, v, keys, values)}) > 1 or q.dtype not in DTYPES:
        reasons.append("needs queries, keys, values and storage of one dtype: float32, float16 or bfloat16")
    if q.shape[2] > MOST_NEW:
        reasons.append(f"takes up to {MOST_NEW} new positions, got {q.shape[2]}")
    if q.shape[3] > MOST_CHANNELS:
        reasons.append(f"takes heads of up to {MOST_CHANNELS} channels, got {q.shape[3]}")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        reasons.append("needs storage whose channels lie beside each other")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        reasons.append("has no gradient (torch.no_grad or inference_mode)")
    return reasons
