"""The one entry to decode attention: `decode_attention(q, k, v, keys, values, lengths, backend="auto")`."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from vistok.kernels.decode_attention.backends import BACKENDS, objections
from vistok.kernels.rotation import Rotation

logger = logging.getLogger(__name__)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    ancestors: Tensor | None = None,
    rotation: Rotation | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append new positions to a cache of fixed size, in place, and attend from them to it.

    Row i of the storage holds `lengths[i]` positions. The new ones are written behind them; those beyond the storage are
    dropped, neither written nor seen. A new position sees what was stored before it, as far as `keep` allows, and its
    `ancestors` among the new ones; one that sees nothing gets zeros. What lies elsewhere in the storage may be anything,
    NaN included. Nothing depends on the values of `lengths` but the result, and on a GPU or compiled nobody waits for
    them: a call can be captured in a CUDA graph and traced with `fullgraph=True`.

    Args:
        q: `[b h t d]`, not rotated yet.
        k: `[b hk t d]`, likewise; `hk` divides `h` (grouped queries, Ainslie et al. 2023).
        v: `[b hk t d]`.
        keys, values: `[b hk L d]`, the storage; keys in it are rotated.
        lengths: `[b]` int64, not negative.
        ancestors: `[b t t]` or `[1 t t]` boolean: new position i sees new position j; `None`: all see each other.
        rotation: cosines and sines of the new positions, `[t d/2]` or `[b 1 t d/2]`, as `rotate` takes them.
        keep: `[b L]` boolean: stored positions that may be seen; `None`: all.
        scale: factor on the logits, `d ** -0.5` by default.
        backend: `"auto"` takes Triton on CUDA where it covers the call, else PyTorch's operators; a name ("triton",
            "torch", "reference") runs that backend or raises.

    Returns:
        `[b h t d]` in the dtype of `q`.

    Raises:
        ValueError: shapes that do not belong together, an unknown backend, or a named one that cannot run (the reasons
            are listed).
    """
    _check(q, k, v, keys, values, lengths, ancestors, rotation, keep)
    name = _choose(q, k, v, keys, values, backend)
    if not q.numel():
        return torch.empty_like(q)
    return BACKENDS[name](q, k, v, keys, values, lengths, ancestors, rotation, keep, scale)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None,
    rotation: Rotation | None,
    keep: Tensor | None,
) -> None:
    b, h, t, d = q.shape
    num_key_heads, max_length = keys.shape[1:3]
    if not k.shape == v.shape == (b, num_key_heads, t, d):
        raise ValueError(
            f"queries {list(q.shape)} over storage {list(keys.shape)} need new keys and values "
            f"[{b} {num_key_heads} {t} {d}], got {list(k.shape)} and {list(v.shape)}"
        )
    if not keys.shape == values.shape == (b, num_key_heads, max_length, d) or not max_length:
        raise ValueError(
            f"{b} rows of {d} channels cannot be stored in {list(keys.shape)} and {list(values.shape)}"
        )
    if h % num_key_heads:
        raise ValueError(f"{h} query heads are not a multiple of {num_key_heads} key heads")
    if lengths.shape != (b,):
        raise ValueError(f"lengths are one per row, [{b}], got {list(lengths.shape)}")
    if ancestors is not None and ancestors.shape not in ((b, t, t), (1, t, t)):
        raise ValueError(
            f"ancestors of {t} new positions are [{b} {t} {t}] or [1 {t} {t}], got {list(ancestors.shape)}"
        )
    if keep is not None and keep.shape != (b, max_length):
        raise ValueError(f"keep covers the storage, [{b} {max_length}], got {list(keep.shape)}")
    if rotation is not None and any(x.shape not in ((t, d // 2), (b, 1, t, d // 2)) for x in rotation):
        raise ValueError(
            f"a rotation of {t} positions of {d} channels is [{t} {d // 2}] or [{b} 1 {t} {d // 2}], "
            f"got {[list(x.shape) for x in rotation]}"
        )


def _choose(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, name: str) -> str:
    if name == "auto":
        if q.device.type != "cuda":
            return "torch"
        reasons = objections("triton", q, k, v, keys, values)
        if reasons and not torch.compiler.is_compiling():
            _log_once("; ".join(reasons))
        return "torch" if reasons else "triton"
    if name not in BACKENDS:
        raise ValueError(f"unknown decode attention backend {name!r}; available: auto, {', '.join(BACKENDS)}")
    if reasons := objections(name, q, k, v, keys, values):
        raise ValueError(f"decode attention backend {name!r} cannot run: {'; '.join(reasons)}")
    return name


@functools.cache
def _log_once(reasons: str) -> None:
    logger.info("decode attention without Triton: %s", reasons)
