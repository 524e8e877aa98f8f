"""torch's scaled_dot_product_attention: fused for no mask and for a causal one, with a dense mask for the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention.inputs import clear_hidden, share_heads
from vistok.kernels.attention.masks import AttentionMask, CausalMask, PackedMask


class SdpaBackend:
    name = "sdpa"

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        return []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        is_causal = isinstance(mask, CausalMask) and q.shape[-2] > 1
        if mask is None or isinstance(mask, CausalMask) and q.shape[-2] in (1, k.shape[-2]):
            return _sdpa(q, k, v, is_causal=is_causal, scale=scale)
        if isinstance(mask, PackedMask):
            return self._one_by_one(q, k, v, mask, scale)
        dense = mask.dense(q.shape[-2], k.shape[-2], q.device)
        if dense.dtype != torch.bool and q.device.type == "cuda":
            dense = dense.to(q.dtype)  # which the fused kernels insist on
        k, v = clear_hidden(q, k, v, mask)
        return _sdpa(q, k, v, attn_mask=dense, scale=scale)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
        """A call for each sequence: a dense mask would cost the square of the whole row."""
        mask.check(q.shape[-2], k.shape[-2])
        parts = [x.split(mask.lengths, dim=-2) for x in (q, k, v)]
        results = [
            _sdpa(one_q, one_k, one_v, scale=scale) for one_q, one_k, one_v in zip(*parts, strict=True)
        ]
        return torch.cat(results, dim=-2)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """With fewer heads of keys; of the fused CUDA kernels only those without a mask in half precision share them."""
    shares = q.shape[1] != k.shape[1]
    if shares and q.device.type == "cuda" and (attn_mask is not None or q.dtype == torch.float32):
        k, v = share_heads(q, k, v)
        shares = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=shares
    )
