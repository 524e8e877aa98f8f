"""The definition of decode attention that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.rotation import Rotation, rotate


def reference_decode_attention(
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
    """Rotate, append, and attend over the whole storage in float32 or wider; see `decode_attention`."""
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    append(k, v, keys, values, lengths)
    visible = visible_positions(lengths, q.shape[2], keys.shape[2], ancestors, keep)  # [b t L]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))  # [b hk group t d]
    logits = grouped @ keys.to(wide)[:, :, None].transpose(-2, -1)  # [b hk group t L]
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    weights = logits.softmax(dim=-1).masked_fill(
        ~visible[:, None, None], 0
    )  # of a query that sees nothing: zeros
    seen = values.to(wide).masked_fill(
        ~visible.any(1)[:, None, :, None], 0
    )  # a weight of 0 does not silence a NaN
    return (weights @ seen[:, :, None]).flatten(1, 2).to(q.dtype)


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Write a block `[b hk t d]` to positions `lengths[i] ..` of row i of the storage `[b hk L d]`, as far as they exist.

    Positions that do not exist are written to the last one, with what belongs there: a place that is written twice
    gets the same twice, so that the number of writes is fixed.
    """
    last = keys.shape[2] - 1
    rows = torch.arange(len(keys), device=keys.device)[:, None]
    new = torch.arange(k.shape[2], device=k.device)
    fitting = torch.minimum(new, last - lengths[:, None]).clamp_min(0)  # [b t], of the block
    places = (lengths[:, None] + new).clamp_max(last)  # [b t], of the storage
    is_full = (lengths > last)[:, None, None, None]
    for block, storage in ((k, keys), (v, values)):
        written = block.to(storage.dtype)[rows, :, fitting]  # [b t hk d]
        storage[rows, :, places] = torch.where(is_full, storage[rows, :, places], written)


def visible_positions(
    lengths: Tensor, num_new: int, num_positions: int, ancestors: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Which of the storage's positions each of `num_new` new ones sees, `[b num_new num_positions]`."""
    new = (
        torch.arange(num_positions, device=lengths.device) - lengths[:, None]
    )  # [b L]; negative: stored before
    before = new < 0 if keep is None else (new < 0) & keep
    among = (new >= 0) & (new < num_new)
    if ancestors is None:
        return (before | among)[:, None].expand(-1, num_new, -1)
    places = new.clamp(0, num_new - 1)[:, None].expand(-1, num_new, -1)  # [b t L]
    above = ancestors.expand(len(lengths), -1, -1).gather(2, places)
    return before[:, None] | (among[:, None] & above)
