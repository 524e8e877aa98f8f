"""Attention backends. Each computes the same function or says why it cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention.masks import AttentionMask, CausalMask
from vistok.kernels.attention.reference import reference_attention


class AttentionBackend(Protocol):
    """One way to compute attention."""

    name: str

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        """Reasons why this call cannot run here; empty when it can."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor: ...


class ReferenceBackend:
    name = "reference"

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        return []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        return reference_attention(q, k, v, mask, scale)


class SdpaBackend:
    name = "sdpa"

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        return []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        if isinstance(mask, CausalMask) and q.shape[-2] == k.shape[-2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        if mask is None or (isinstance(mask, CausalMask) and q.shape[-2] == 1):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        dense = mask.dense(q.shape[-2], k.shape[-2], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale)


class XFormersBackend:
    name = "xformers"

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = []
        if q.device.type != "cuda":
            reasons.append(f"needs CUDA tensors, got {q.device.type}")
        if find_spec("xformers") is None:
            reasons.append("xformers is not installed (pip install 'vistok[gpu]')")
        if mask is not None and not isinstance(mask, CausalMask):
            reasons.append(f"takes no {type(mask).__name__} yet")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from xformers.ops import fmha

        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if mask is not None else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b n h d]
        return fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)


BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend for backend in (SdpaBackend(), XFormersBackend(), ReferenceBackend())
}
