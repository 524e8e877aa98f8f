"""What backends do to queries, keys and values before they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.attention.masks import AttentionMask


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless `q [b h q d]`, `k [b hk k d]`, `v [b hk k d]` fit, with `h` a multiple of `hk`."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes tensors [batch heads positions channels], got {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"there must be one value per key, as wide as the key, got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must have the same batch and channels, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"each head of keys serves as many heads of queries, got {shapes}")


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def share_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[b h k d]` with a head for each of the queries: those next to each other share one."""
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def clear_hidden(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros where no query of the row looks.

    A weight of 0 hides a number, but not a NaN, and storage that was never written may hold one. This costs a copy of
    both, so only masks that leave such storage (`AttentionMask.hides_keys`) pay it, and on the CPU only where they do.
    """
    if mask is None or not mask.hides_keys:
        return k, v
    sizes = (q.shape[-2], k.shape[-2])
    hidden = mask.once(f"hidden {sizes}", k.device, lambda: _hidden(mask, *sizes, k.device))
    if hidden is None:
        return k, v
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)


def _hidden(mask: AttentionMask, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """`[b|1 1 k 1]`, the keys that nobody sees; `None` where it costs nothing to know that there are none."""
    seen = mask.dense(num_queries, num_keys, device).any(dim=-2).any(dim=1, keepdim=True)  # [b|1 1 k]
    if device.type == "cpu" and not torch.compiler.is_compiling() and bool(seen.all()):
        return None
    return ~seen[..., None]
