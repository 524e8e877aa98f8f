"""xformers' memory_efficient_attention (Lefaudeux et al. 2022), which picks among FlashAttention 2, 3 and CUTLASS."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention.inputs import clear_hidden, needs_gradients, share_heads
from vistok.kernels.attention.masks import AttentionMask, CausalMask, KeyMask, PackedMask

HALF = (torch.float16, torch.bfloat16)
BIAS_ALIGNMENT = 8  # rows of a dense bias start at multiples of so many entries


class XFormersBackend:
    """No mask, causal ones and packed rows by their types; prefixes of keys too, without gradients; others as a bias."""

    name = "xformers"

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        reasons = []
        if q.device.type != "cuda":
            reasons.append(f"needs CUDA tensors, got {q.device.type}")
        if find_spec("xformers") is None:
            reasons.append("xformers is not installed (pip install 'vistok[gpu]')")
        if q.dtype not in (torch.float32, *HALF) or not q.dtype == k.dtype == v.dtype:
            reasons.append(f"needs one of float32, float16, bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}")
        multiple = 8 if q.dtype in HALF else 4
        if q.shape[-1] % multiple:
            reasons.append(
                f"needs heads of a multiple of {multiple} channels, got {q.shape[-1]} of {q.dtype}"
            )
        if isinstance(mask, PackedMask) and len(q) != 1:
            reasons.append(f"takes one packed row, got {len(q)}")
        if q.device.type == "cuda" and (q.dtype == torch.float32 or _is_dense(q, k, v, mask)):
            major, minor = torch.cuda.get_device_capability(q.device)
            if (major, minor) > (9, 0):  # only CUTLASS takes these, and xformers' ends with Hopper
                reasons.append(f"takes no float32 and no dense mask on compute capability {major}.{minor}")
        return reasons

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from xformers.ops import fmha

        if mask is not None:
            mask.check(q.shape[-2], k.shape[-2])
        is_dense = _is_dense(q, k, v, mask)
        if is_dense:
            k, v = clear_hidden(q, k, v, mask)
        if is_dense or needs_gradients(q, k, v):  # neither takes heads in groups
            k, v = share_heads(q, k, v)
        rows = [x.transpose(1, 2) for x in (q, k, v)]  # [b n h d]
        if isinstance(mask, KeyMask) and not is_dense:
            rows = [x.flatten(0, 1)[None] for x in rows]  # [1 b*n h d]
        seen = fmha.memory_efficient_attention(
            *_in_groups(*(x if x.stride(-1) == 1 else x.contiguous() for x in rows)),
            attn_bias=_bias(fmha.attn_bias, q, k, mask, is_dense),
            scale=scale,
        )
        return seen.reshape(q.transpose(1, 2).shape).transpose(1, 2)


def _is_dense(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> bool:
    """Whether xformers has no type of its own for the mask; its kernels for prefixes have no backward pass."""
    if isinstance(mask, KeyMask) and mask.lengths is not None:
        return q.dtype == torch.float32 or needs_gradients(q, k, v)
    return not (mask is None or isinstance(mask, CausalMask | PackedMask))


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[b n h d]` each, and where heads are shared `[b n hk h/hk d]`; the keys of a group are one in memory."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads == num_kv_heads:
        return q, k, v
    group = num_heads // num_kv_heads
    k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
    return q.unflatten(2, (num_kv_heads, group)), k, v


def _bias(types: Any, q: Tensor, k: Tensor, mask: AttentionMask | None, is_dense: bool) -> Any:
    """`None`, one of the types of `xformers.ops.fmha.attn_bias`, or a tensor `[b h q k]`."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if mask is None or (isinstance(mask, CausalMask) and num_queries == 1):
        return None
    if isinstance(mask, CausalMask):
        return types.LowerTriangularFromBottomRightMask()
    if is_dense:
        form = f"xformers {q.shape} {num_keys} {q.dtype}"
        return mask.once(form, q.device, lambda: _dense_bias(q, num_keys, mask))
    if isinstance(mask, PackedMask):
        lengths, blocks = list(mask.lengths), types.BlockDiagonalMask
        return mask.once("xformers", q.device, lambda: blocks.from_seqlens(lengths, device=q.device))
    assert isinstance(mask, KeyMask) and mask.lengths is not None
    form, lengths, padded = f"xformers {num_queries}", list(mask.lengths), types.BlockDiagonalPaddedKeysMask
    return mask.once(
        form,
        q.device,
        lambda: padded.from_seqlens([num_queries] * len(lengths), num_keys, lengths, device=q.device),
    )


def _dense_bias(q: Tensor, num_keys: int, mask: AttentionMask) -> Tensor:
    """`[b h q k]` in the dtype of the queries; its rows are parts of longer, aligned ones."""
    dense = mask.dense(q.shape[-2], num_keys, q.device)
    if dense.dtype == torch.bool:
        dense = torch.zeros_like(dense, dtype=q.dtype).masked_fill(~dense, float("-inf"))
    aligned = F.pad(dense.to(q.dtype), (0, -num_keys % BIAS_ALIGNMENT)).contiguous()
    return aligned[..., :num_keys].expand(*q.shape[:3], num_keys)
