"""Decode attention out of plain PyTorch operators, arranged for eager CPUs and for what `torch.compile` makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.decode_attention.reference import append, visible_positions
from vistok.kernels.rotation import Rotation, rotate

FEW_QUERIES = 2  # per key head; on a CPU, so many are faster in float32, and compiled as sums of products


def composed_decode_attention(
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
    """The reference, of more than a few queries with products in the dtype of `q`; see `decode_attention`.

    Where looking at the lengths makes nobody wait (on the CPU, unless it is compiled) no more is read than the longest
    row has, and there is no mask if all rows are equally long.
    """
    num_new, num_read, sees_all = q.shape[2], keys.shape[2], False
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        shortest, longest = (int(length) for length in lengths.aminmax())
        num_read = min(longest + num_new, num_read)
        sees_all = shortest == longest and ancestors is None and keep is None
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    append(k, v, keys, values, lengths)
    keys, values = (x[:, :, :num_read].to(q.dtype) for x in (keys, values))
    visible = None
    if not sees_all:
        visible = visible_positions(
            lengths, num_new, num_read, ancestors, None if keep is None else keep[:, :num_read]
        )
        values = torch.where(visible.any(1)[:, None, :, None], values, 0)  # weights of 0 do not silence a NaN
    return _attend(q, keys, values, visible, q.shape[-1] ** -0.5 if scale is None else scale)


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attention of `q [b h t d]` over `[b hk n d]` with `visible [b t n]`; a query that sees nothing gets zeros."""
    b, h, t, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(b, keys.shape[1], -1, d)  # [b hk m d], m = h/hk * t
    is_few = grouped.shape[2] <= FEW_QUERIES and q.device.type == "cpu"
    if is_few:
        grouped, keys, values = (x.to(wide) for x in (grouped, keys, values))
    sums_up = is_few and torch.compiler.is_compiling()  # fused, without a temporary of that size
    logits = (grouped[:, :, :, None] * keys[:, :, None]).sum(-1) if sums_up else grouped @ keys.mT
    logits = logits.to(wide) * scale  # [b hk m n]
    if visible is None:
        weights = logits.softmax(dim=-1)
    else:
        may_see = visible.repeat(1, grouped.shape[2] // t, 1)[:, None]  # [b 1 m n]
        weights = logits.masked_fill(~may_see, float("-inf")).softmax(dim=-1)
        weights = torch.where(may_see, weights, 0)
    weights = weights.to(values.dtype)
    attended = (
        (weights[..., None] * values[:, :, None]).sum(-2) if sums_up else weights @ values
    )  # [b hk m d]
    return attended.to(q.dtype).reshape(b, h, t, d)
