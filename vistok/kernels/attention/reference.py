"""The definition of attention that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.attention.inputs import clear_hidden, share_heads
from vistok.kernels.attention.masks import AttentionMask


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention written out (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: `[b h q d]`.
        k: `[b hk k d]`; query head i reads head `i // (h / hk)` (grouped queries, Ainslie et al. 2023, section 2.2).
        v: `[b hk k d]`.
        mask: which pairs may attend; `None` means all.
        scale: factor on the logits, `d ** -0.5` by default.

    Returns:
        `[b h q d]` in the dtype of `q`. A query that may attend to nothing gets zeros, as in torch's SDPA.
    """
    k, v = share_heads(q, *clear_hidden(q, k, v, mask))
    logits = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [b h q k]
    if mask is None:
        return logits.softmax(dim=-1) @ v
    dense = mask.dense(q.shape[-2], k.shape[-2], q.device)
    if dense.dtype == torch.bool:
        hidden = ~dense
    else:
        hidden = dense.isneginf()
        logits = logits + dense.to(logits.dtype)
    weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return weights.masked_fill(hidden, 0) @ v  # NaN in a row of hidden keys alone
