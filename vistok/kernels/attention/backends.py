"""All attention backends by name. Each computes the same function or says why it cannot run."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vistok.kernels.attention.diffusers import DIFFERENTIABLE, INFERENCE_ONLY, DiffusersBackend
from vistok.kernels.attention.flex import FlexBackend
from vistok.kernels.attention.masks import AttentionMask
from vistok.kernels.attention.reference import reference_attention
from vistok.kernels.attention.sdpa import SdpaBackend
from vistok.kernels.attention.xformers import XFormersBackend
from vistok.kernels.triton_support import triton_objections

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_HEAD_DIM = 128


class AttentionBackend(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str: ...

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        """Reasons why this call cannot run here; empty when it can."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor: ...


class ReferenceBackend:
    name = "reference"

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        return []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        return reference_attention(q, k, v, mask, scale)


class TritonBackend:
    """Our own kernels: every mask, with gradients for queries, keys and values."""

    name = "triton"

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = triton_objections(q.device)
        if q.shape[-1] > TRITON_MAX_HEAD_DIM:
            reasons.append(f"covers heads of up to {TRITON_MAX_HEAD_DIM} channels, got {q.shape[-1]}")
        if q.dtype not in TRITON_DTYPES or not q.dtype == k.dtype == v.dtype:
            reasons.append(f"needs one of float32, float16, bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from vistok.kernels.attention.triton import triton_attention

        return triton_attention(q, k, v, mask, scale)


_ALL: tuple[AttentionBackend, ...] = (
    SdpaBackend(),
    XFormersBackend(),
    FlexBackend(),
    TritonBackend(),
    ReferenceBackend(),
    *(DiffusersBackend(name) for name in DIFFERENTIABLE + INFERENCE_ONLY),
)
BACKENDS: dict[str, AttentionBackend] = {backend.name: backend for backend in _ALL}
