"""Attention backends. Each computes the same function or says why it cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention.masks import AttentionMask, CausalMask, OrderMask, PackedMask
from vistok.kernels.attention.reference import reference_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key): may they attend?


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
    """torch's FlexAttention, for packed rows and orders: blocks of pairs that may not attend are skipped."""

    name = "flex"

    def objections(self, q: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = []
        if not isinstance(mask, PackedMask | OrderMask):
            reasons.append(f"takes a PackedMask or an OrderMask, got {type(mask).__name__}")
        if q.device.type != "cuda":
            reasons.append(f"needs CUDA tensors to be faster than sdpa, got {q.device.type}")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        assert isinstance(mask, PackedMask | OrderMask)
        block_mask = make_block_mask(mask, q.shape[-2], k.shape[-2], q.device)
        compute: Any = _compiled_flex() if q.device.type == "cuda" else flex_attention
        return compute(q, k, v, block_mask=block_mask, scale=scale)


def make_block_mask(
    mask: PackedMask | OrderMask, num_queries: int, num_keys: int, device: torch.device
) -> BlockMask:
    """FlexAttention's form of a mask; a batch axis only where the mask has one. Made once per mask and device.

    Raises:
        ValueError: the mask is one of another number of queries or keys.
    """
    mask.check(num_queries, num_keys)
    return mask.once("block", device, lambda: _block_mask(mask, num_queries, num_keys, device))


def _block_mask(
    mask: PackedMask | OrderMask, num_queries: int, num_keys: int, device: torch.device
) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    if isinstance(mask, PackedMask):
        may_attend, batch_size = _same_sequence(mask, device), None
    else:
        may_attend, batch_size = _no_later_rank(mask.to(device)), mask.batch_size
    return create_block_mask(may_attend, batch_size, None, num_queries, num_keys, device=str(device))


def _same_sequence(mask: PackedMask, device: torch.device) -> MaskMod:
    ids = mask.sequence_ids(device)
    return lambda b, h, query, key: ids[query] == ids[key]


def _no_later_rank(mask: OrderMask) -> MaskMod:
    # Compiled code is kept for a closure over tensors, and not for one over a new mask each time.
    query_ranks, key_ranks, is_private = mask.query_ranks, mask.key_ranks, mask.is_private

    def may_attend(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_rank = query_ranks[b, query] if query_ranks.ndim == 2 else query_ranks[query]
        key_rank = key_ranks[b, key] if key_ranks.ndim == 2 else key_ranks[key]
        return OrderMask.allows(query_rank, key_rank, None if is_private is None else is_private[key])

    return may_attend


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend for backend in (SdpaBackend(), XFormersBackend(), FlexBackend(), ReferenceBackend())
}
