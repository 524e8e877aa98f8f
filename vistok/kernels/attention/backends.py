"""Attention backends. Each computes the same function or says why it cannot run."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention.masks import AttentionMask, CausalMask, PackedMask
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
        if isinstance(mask, PackedMask):
            return self._one_by_one(q, k, v, mask, scale)
        dense = mask.dense(q.shape[-2], k.shape[-2], q.device)
        if dense.dtype != torch.bool and q.device.type == "cuda":
            dense = dense.to(q.dtype)  # which the fused kernels insist on
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
        """A call for each sequence: a dense mask would cost the square of the whole row."""
        mask.check(q.shape[-2], k.shape[-2])
        parts = [x.split(mask.lengths, dim=-2) for x in (q, k, v)]
        results = [
            F.scaled_dot_product_attention(one_q, one_k, one_v, scale=scale)
            for one_q, one_k, one_v in zip(*parts, strict=True)
        ]
        return torch.cat(results, dim=-2)


class XFormersBackend:
    name = "xformers"

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = []
        if q.device.type != "cuda":
            reasons.append(f"needs CUDA tensors, got {q.device.type}")
        if find_spec("xformers") is None:
            reasons.append("xformers is not installed (pip install 'vistok[gpu]')")
        if mask is not None and not isinstance(mask, CausalMask | PackedMask):
            reasons.append(f"takes no {type(mask).__name__} yet")
        if isinstance(mask, PackedMask) and len(q) != 1:
            reasons.append(f"takes one packed row, got {len(q)}")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from xformers.ops import fmha

        bias = None
        if isinstance(mask, CausalMask):
            bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
        elif isinstance(mask, PackedMask):
            mask.check(q.shape[-2], k.shape[-2])
            bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(mask.lengths))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b n h d]
        return fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)


class FlexBackend:
    """torch's FlexAttention, for packed rows: blocks of pairs that may not attend are skipped."""

    name = "flex"

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = []
        if not isinstance(mask, PackedMask):
            reasons.append(f"takes a PackedMask, got {type(mask).__name__}")
        if q.device.type != "cuda":
            reasons.append(f"needs CUDA tensors to be faster than sdpa, got {q.device.type}")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        assert isinstance(mask, PackedMask)
        n = q.shape[-2]
        mask.check(n, k.shape[-2])
        ids = mask.sequence_ids(q.device)

        def is_same_sequence(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ids[query] == ids[key]

        block_mask = create_block_mask(is_same_sequence, None, None, n, n, device=str(q.device))
        compute: Any = _compiled_flex() if q.device.type == "cuda" else flex_attention
        return compute(q, k, v, block_mask=block_mask, scale=scale)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend for backend in (SdpaBackend(), XFormersBackend(), FlexBackend(), ReferenceBackend())
}
