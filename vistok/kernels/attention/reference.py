"""The definition of attention that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.attention.masks import AttentionMask


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention written out (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: `[b h q d]`.
        k: `[b h k d]`.
        v: `[b h k d]`.
        mask: which pairs may attend; `None` means all.
        scale: factor on the logits, `d ** -0.5` by default.

    Returns:
        `[b h q d]` in the dtype of `q`. A query that may attend to nothing gets NaN, as in torch's SDPA.
    """
    logits = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [b h q k]
    if mask is not None:
        dense = mask.dense(q.shape[-2], k.shape[-2], q.device)
        is_boolean = dense.dtype == torch.bool
        logits = logits.masked_fill(~dense, float("-inf")) if is_boolean else logits + dense.to(logits.dtype)
    return logits.softmax(dim=-1) @ v
