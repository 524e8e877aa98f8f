"""torch's FlexAttention: every mask, of which only the blocks that some pair needs are computed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.kernels.attention.inputs import clear_hidden, needs_gradients
from vistok.kernels.attention.masks import AttentionMask
from vistok.kernels.attention.rules import looked_up

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

LEAST_HEAD_DIM = 16  # of the compiled kernel


class FlexBackend:
    """On CUDA compiled, which takes seconds at the first call of a mask's kind; elsewhere written out, for tests."""

    name = "flex"

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = []
        if q.device.type not in ("cuda", "cpu"):
            reasons.append(f"needs CUDA tensors (the CPU runs it slowly, for tests), got {q.device.type}")
        if q.device.type == "cpu" and needs_gradients(q, k, v):
            reasons.append("has no gradient on the CPU")
        if q.device.type == "cuda" and q.shape[-1] < LEAST_HEAD_DIM:
            reasons.append(f"needs heads of at least {LEAST_HEAD_DIM} channels, got {q.shape[-1]}")
        if not q.dtype == k.dtype == v.dtype:
            reasons.append(f"needs q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        k, v = clear_hidden(q, k, v, mask)
        sizes = (q.shape[-2], k.shape[-2])
        forms: dict[str, Any] = {}
        if mask is not None and mask.is_additive:
            forms["score_mod"] = _score_mod(mask, *sizes, q.device)
        elif mask is not None:
            forms["block_mask"] = make_block_mask(mask, *sizes, q.device)
        compute: Any = _compiled_flex() if q.device.type == "cuda" else flex_attention
        return compute(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **forms)


def make_block_mask(mask: AttentionMask, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """FlexAttention's form of a boolean mask; a batch axis only where the mask has one. Made once per mask and device.

    Raises:
        ValueError: the mask is one of another number of queries or keys.
    """
    mask.check(num_queries, num_keys)
    return mask.once(
        f"blocks {num_queries} {num_keys}", device, lambda: _block_mask(mask, num_queries, num_keys, device)
    )


def _block_mask(mask: AttentionMask, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    rule = mask.rule(num_queries, num_keys, device)
    return create_block_mask(
        rule.allows, rule.batch_size, rule.num_heads, num_queries, num_keys, device=str(device)
    )


def _score_mod(mask: AttentionMask, num_queries: int, num_keys: int, device: torch.device) -> Any:
    added = looked_up(mask.dense(num_queries, num_keys, device))
    return lambda score, row, head, query, key: score + added(row, head, query, key)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
