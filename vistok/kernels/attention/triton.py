"""Attention in Triton: tiles of queries pass over the keys with a running softmax, nothing `[q k]` is stored.

The forward pass is that of FlashAttention-2 (Dao 2023, algorithm 1), the backward pass its algorithm 2 as two kernels,
one by keys and one by queries, so that no sum is left to chance. A tile of queries reads only the keys between the first
and the last that it may see. Products accumulate in float32; float32 inputs are multiplied exactly, not as TF32.

Logits are kept in units of log(2), as the hardware raises 2 to a power.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistok.kernels.attention.masks import AttentionMask, CausalMask, PackedMask
from vistok.kernels.triton_support import is_interpreting

BOOLEAN, ADDITIVE = tl.constexpr(1), tl.constexpr(2)  # kinds of a dense mask
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(base, rows, stride_row, stride_dim, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[r BLOCK_D]` of one head; zeros beyond the rows and channels there are."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(base + rows[:, None] * stride_row + dims[None, :] * stride_dim, mask=inside, other=0.0)


@triton.jit
def _dot(left, right, WIDENS: tl.constexpr):
    """A product that accumulates in float32; the interpreter knows no bfloat16, so its entries become float32 first."""
    if WIDENS:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _store(
    base, rows, values, stride_row, stride_dim, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    places = base + rows[:, None] * stride_row + dims[None, :] * stride_dim
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _may_attend(
    rows, cols, spans, dense, stride_row, stride_col, num_queries, num_keys,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """`[r c]`: which queries see which keys."""
    allowed = (rows < num_queries)[:, None] & (cols < num_keys)[None, :]
    if CAUSAL:
        allowed = allowed & (cols[None, :] <= rows[:, None] + (num_keys - num_queries))
    if SPANS:
        first = tl.load(spans + 2 * rows, mask=rows < num_queries, other=0)
        end = tl.load(spans + 2 * rows + 1, mask=rows < num_queries, other=0)
        allowed = allowed & (cols[None, :] >= first[:, None]) & (cols[None, :] < end[:, None])
    if DENSE == BOOLEAN:
        places = dense + rows[:, None].to(tl.int64) * stride_row + cols[None, :] * stride_col
        allowed = allowed & (tl.load(places, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def _logits(
    q, k, rows, cols, allowed, dense, stride_row, stride_col, scale, DENSE: tl.constexpr, WIDENS: tl.constexpr
):  # fmt: skip
    """`[r c]` in units of log(2), -inf where a query does not see a key, whatever the key holds."""
    logits = _dot(q, tl.trans(k), WIDENS) * (scale * LOG2_E)
    if DENSE == ADDITIVE:
        places = dense + rows[:, None].to(tl.int64) * stride_row + cols[None, :] * stride_col
        added = tl.load(places, mask=allowed, other=0.0).to(tl.float32)
        logits += added * LOG2_E
    return tl.where(allowed, logits, float("-inf"))


@triton.jit
def _seen_only(cols, allowed, num_keys):
    """`[c]`: keys that some query of the tile sees, and for others one beyond them all, which is loaded as zeros.

    A weight of 0 does not hide a NaN. The columns are replaced, not the values: a select on what a product reads does
    not compile everywhere.
    """
    return tl.where(tl.max(allowed.to(tl.int32), axis=0) > 0, cols, num_keys)


@triton.jit
def _seen_keys(first_row, last_row, spans, num_queries, num_keys, CAUSAL: tl.constexpr, SPANS: tl.constexpr):
    """Where the keys begin and end that queries `first_row` to `last_row` may see."""
    begin, end = 0, num_keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(num_keys, last_row + 1 + num_keys - num_queries), 0)
    if SPANS:
        begin = tl.load(spans + 2 * first_row)
        end = tl.load(spans + 2 * last_row + 1)
    return begin, end


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, spans, dense_ptr, scale, heads, group, num_queries, num_keys,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, m_h, m_q, m_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, DENSE: tl.constexpr, WIDENS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile, stream = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (stream // heads).to(tl.int64), (stream % heads).to(tl.int64)
    k_ptr += b * k_b + h // group * k_h
    v_ptr += b * v_b + h // group * v_h
    dense_ptr += b * m_b + h * m_h
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr + b * q_b + h * q_h, rows, q_n, q_d, num_queries, HEAD_DIM, BLOCK_D)

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    last_row = tl.minimum(tile * BLOCK_Q + BLOCK_Q, num_queries) - 1
    begin, end = _seen_keys(tile * BLOCK_Q, last_row, spans, num_queries, num_keys, CAUSAL, SPANS)
    for start in range(begin, end, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        allowed = _may_attend(
            rows, cols, spans, dense_ptr, m_q, m_k, num_queries, num_keys, CAUSAL, SPANS, DENSE
        )
        seen = _seen_only(cols, allowed, num_keys) if HIDES else cols
        k = _load(k_ptr, seen, k_n, k_d, num_keys, HEAD_DIM, BLOCK_D)
        v = _load(v_ptr, seen, v_n, v_d, num_keys, HEAD_DIM, BLOCK_D)
        logits = _logits(q, k, rows, cols, allowed, dense_ptr, m_q, m_k, scale, DENSE, WIDENS)
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # so that -inf - -inf never occurs
        weights = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        result = result * shrink[:, None] + _dot(weights.to(v.dtype), v, WIDENS)
        highest = new_highest

    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    _store(out_ptr + b * o_b + h * o_h, rows, result, o_n, o_d, num_queries, HEAD_DIM, BLOCK_D)
    # The backward pass then finds weights of 2 ** -inf in an empty row.
    lse = tl.where(total == 0.0, float("inf"), highest + tl.log2(total))
    tl.store(lse_ptr + stream.to(tl.int64) * num_queries + rows, lse, mask=rows < num_queries)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, spans, dense_ptr,
    scale, heads, group, num_queries, num_keys,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, m_h, m_q, m_k,
    dq_b, dq_h, dq_n, dq_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, DENSE: tl.constexpr, WIDENS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """A tile of queries over all the keys that it sees."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile, stream = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (stream // heads).to(tl.int64), (stream % heads).to(tl.int64)
    k_ptr += b * k_b + h // group * k_h
    v_ptr += b * v_b + h // group * v_h
    dense_ptr += b * m_b + h * m_h
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr + b * q_b + h * q_h, rows, q_n, q_d, num_queries, HEAD_DIM, BLOCK_D)
    grad = _load(grad_ptr + b * o_b + h * o_h, rows, o_n, o_d, num_queries, HEAD_DIM, BLOCK_D)
    places = stream.to(tl.int64) * num_queries + rows
    lse = tl.load(lse_ptr + places, mask=rows < num_queries, other=float("inf"))
    delta = tl.load(delta_ptr + places, mask=rows < num_queries, other=0.0)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    last_row = tl.minimum(tile * BLOCK_Q + BLOCK_Q, num_queries) - 1
    begin, end = _seen_keys(tile * BLOCK_Q, last_row, spans, num_queries, num_keys, CAUSAL, SPANS)
    for start in range(begin, end, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        allowed = _may_attend(
            rows, cols, spans, dense_ptr, m_q, m_k, num_queries, num_keys, CAUSAL, SPANS, DENSE
        )
        seen = _seen_only(cols, allowed, num_keys) if HIDES else cols
        k = _load(k_ptr, seen, k_n, k_d, num_keys, HEAD_DIM, BLOCK_D)
        v = _load(v_ptr, seen, v_n, v_d, num_keys, HEAD_DIM, BLOCK_D)
        logits = _logits(q, k, rows, cols, allowed, dense_ptr, m_q, m_k, scale, DENSE, WIDENS)
        weights = tl.exp2(logits - lse[:, None])
        d_logits = weights * (_dot(grad, tl.trans(v), WIDENS) - delta[:, None])
        dq += _dot(d_logits.to(k.dtype), k, WIDENS)
    _store(dq_ptr + b * dq_b + h * dq_h, rows, dq * scale, dq_n, dq_d, num_queries, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, spans, dense_ptr,
    scale, heads, group, num_queries, num_keys,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, m_h, m_q, m_k,
    dk_b, dk_h, dk_n, dk_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, DENSE: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """A tile of keys over all the queries that may see it, of all heads that share it; `dv` lies as `dk` does."""
    tiles = tl.cdiv(num_keys, BLOCK_K)
    tile, stream = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, kv_head = (stream // (heads // group)).to(tl.int64), (stream % (heads // group)).to(tl.int64)
    cols = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _load(k_ptr + b * k_b + kv_head * k_h, cols, k_n, k_d, num_keys, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr + b * v_b + kv_head * v_h, cols, v_n, v_d, num_keys, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin, end = 0, num_queries
    if CAUSAL:
        begin = tl.maximum(tile * BLOCK_K - (num_keys - num_queries), 0)
    if SPANS:  # which are symmetric: queries and keys are the same positions
        begin = tl.load(spans + 2 * tile * BLOCK_K)
        end = tl.load(spans + 2 * (tl.minimum(tile * BLOCK_K + BLOCK_K, num_keys) - 1) + 1)
    for i in range(0, group):
        h = kv_head * group + i
        dense = dense_ptr + b * m_b + h * m_h
        for start in range(begin, end, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = _load(q_ptr + b * q_b + h * q_h, rows, q_n, q_d, num_queries, HEAD_DIM, BLOCK_D)
            grad = _load(grad_ptr + b * o_b + h * o_h, rows, o_n, o_d, num_queries, HEAD_DIM, BLOCK_D)
            places = (b * heads + h) * num_queries + rows
            lse = tl.load(lse_ptr + places, mask=rows < num_queries, other=float("inf"))
            delta = tl.load(delta_ptr + places, mask=rows < num_queries, other=0.0)
            allowed = _may_attend(
                rows, cols, spans, dense, m_q, m_k, num_queries, num_keys, CAUSAL, SPANS, DENSE
            )
            logits = _logits(q, k, rows, cols, allowed, dense, m_q, m_k, scale, DENSE, WIDENS)
            weights = tl.exp2(logits - lse[:, None])
            dv += _dot(tl.trans(weights.to(grad.dtype)), grad, WIDENS)
            d_weights = _dot(grad, tl.trans(v), WIDENS) - delta[:, None]
            d_logits = tl.where(allowed, weights * d_weights, 0.0)  # a hidden value may be NaN
            dk += _dot(tl.trans(d_logits.to(q.dtype)), q, WIDENS)
    _store(dk_ptr + b * dk_b + kv_head * dk_h, cols, dk * scale, dk_n, dk_d, num_keys, HEAD_DIM, BLOCK_D)
    _store(dv_ptr + b * dk_b + kv_head * dk_h, cols, dv, dk_n, dk_d, num_keys, HEAD_DIM, BLOCK_D)


class _Attention(torch.autograd.Function):
    """The kernels, for tensors `[b h n d]` of any strides; of a mask its spans, its dense form and the kind of it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Tensor | None,
        dense: Tensor | None,
        is_causal: bool,
        hides_keys: bool,
        scale: float,
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        options = _options(q, spans, dense, is_causal)
        _forward[(_num_tiles(q, options["BLOCK_Q"]),)](
            q, k, v, out, lse, *_sizes(q, k, spans, dense, scale),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *_strides(q, dense), **options, HIDES=hides_keys,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, spans, dense, out, lse)
        ctx.is_causal, ctx.hides_keys, ctx.scale = is_causal, hides_keys, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, spans, dense, out, lse = ctx.saved_tensors
        delta = (out.float() * grad.float()).sum(dim=-1)  # [b h q]
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        strides = *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *_strides(q, dense)
        sizes = _sizes(q, k, spans, dense, ctx.scale)
        options = _options(q, spans, dense, ctx.is_causal)
        _backward_queries[(_num_tiles(q, options["BLOCK_Q"]),)](
            q, k, v, grad, lse, delta, dq, *sizes, *strides, *dq.stride(), **options, HIDES=ctx.hides_keys
        )
        _backward_keys[(_num_tiles(k, options["BLOCK_K"]),)](
            q, k, v, grad, lse, delta, dk, dv, *sizes, *strides, *dk.stride(), **options
        )
        return dq, dk, dv, None, None, None, None, None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None = None, scale: float | None = None
) -> Tensor:
    """See `reference_attention`; heads of at most 128 channels, in one of float32, float16 and bfloat16."""
    spans = dense = None
    if isinstance(mask, PackedMask):
        mask.check(q.shape[-2], k.shape[-2])
        spans = mask.once("spans", q.device, lambda: _spans(mask).to(q.device))
    elif not (mask is None or isinstance(mask, CausalMask)):
        dense = mask.dense(q.shape[-2], k.shape[-2], q.device).expand(*q.shape[:3], k.shape[-2])
        dense = dense.view(torch.uint8) if dense.dtype == torch.bool else dense
    hides_keys = mask is not None and mask.hides_keys
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.cuda.device_of(q):
        return _Attention.apply(q, k, v, spans, dense, isinstance(mask, CausalMask), hides_keys, scale)


def _spans(mask: PackedMask) -> Tensor:
    """`[n 2]` int32: the first position of the sequence that a position lies in, and the one behind it."""
    lengths = torch.tensor(mask.lengths)
    ends = lengths.cumsum(0)
    return torch.stack([ends - lengths, ends], dim=1).repeat_interleave(lengths, dim=0).int()


def _options(q: Tensor, spans: Tensor | None, dense: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """What a kernel is compiled for."""
    head_dim = q.shape[-1]
    block_d = max(16, triton.next_power_of_2(head_dim))
    widest = 32 if q.dtype == torch.float32 else 64
    kind = 0 if dense is None else BOOLEAN.value if dense.dtype == torch.uint8 else ADDITIVE.value
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": min(widest, max(16, triton.next_power_of_2(q.shape[-2]))),
        "BLOCK_K": widest,
        "CAUSAL": is_causal,
        "SPANS": spans is not None,
        "DENSE": kind,
        "WIDENS": q.dtype == torch.bfloat16 and is_interpreting(),
        "num_warps": 8 if block_d * q.element_size() > 128 else 4,  # or registers spill, says ptxas
        "num_stages": 2,
    }


def _num_tiles(x: Tensor, block: int) -> int:
    """Programs, one for each tile of each head."""
    return x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], block)


def _sizes(q: Tensor, k: Tensor, spans: Tensor | None, dense: Tensor | None, scale: float) -> tuple[Any, ...]:
    """The arguments that all kernels share; queries stand in for tensors that are not read."""
    heads, kv_heads = q.shape[1], k.shape[1]
    tensors = q if spans is None else spans, q if dense is None else dense
    return *tensors, scale, heads, heads // kv_heads, q.shape[2], k.shape[2]


def _strides(q: Tensor, dense: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if dense is None else dense.stride()
