"""The one entry to attention: `attention(q, k, v, mask, backend="auto")`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from vistok.kernels.attention.backends import BACKENDS, AttentionBackend
from vistok.kernels.attention.inputs import check_shapes, needs_gradients
from vistok.kernels.attention.masks import AttentionMask, CausalMask, PackedMask

logger = logging.getLogger(__name__)
_preferred: contextvars.ContextVar[str] = contextvars.ContextVar("attention_backend", default="auto")


@contextlib.contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Inside the block, calls that do not name a backend use `name`; it runs or raises, as if named."""
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention.

    `"auto"` takes the first backend of these without objections:

    - on the CPU and other devices without CUDA: sdpa;
    - packed rows on CUDA: xformers, triton, sdpa, which needs a call for each sequence;
    - no mask, one causal query, or as many causal queries as keys, on CUDA: sdpa, whose fused kernels take these;
    - other masks on CUDA: sdpa where gradients are needed, else triton, which reads a boolean mask as it is and needs
      no copy of keys that nobody sees, then sdpa.

    flex and the backends of diffusers run by name alone: the one compiles for seconds, the others are there to compare.

    Args:
        q: `[b h q d]`.
        k: `[b hk k d]`; `h` is a multiple of `hk`, and heads of queries next to each other share one of keys.
        v: `[b hk k d]`.
        mask: which pairs may attend; `None` means all.
        scale: factor on the logits, `d ** -0.5` by default.
        backend: `"auto"` takes the one set by `attention_backend`, else the best that can run; a name runs that backend
            or raises.

    Returns:
        `[b h q d]`. A query that may attend to nothing gets zeros.

    Raises:
        ValueError: shapes that do not fit each other, a mask of other sizes, an unknown backend, or a named one that
            cannot run this call (the reasons are listed).
    """
    check_shapes(q, k, v)
    name = _preferred_name() if backend == "auto" else backend
    chosen = _best(q, k, v, mask) if name == "auto" else _named(name, q, k, v, mask)
    if q.numel() == 0 or k.numel() == 0:
        chosen = BACKENDS["reference"]  # kernels do not start for nothing
    return chosen(q, k, v, mask, scale)


@torch.compiler.assume_constant_result
def _preferred_name() -> str:
    """What `attention_backend` sets; compiled code keeps what was set when it was traced."""
    return _preferred.get()


def _preferences(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> tuple[str, ...]:
    """See `attention`; the last has no objections, whatever comes."""
    if q.device.type != "cuda":
        return ("sdpa",)
    if isinstance(mask, PackedMask):
        return "xformers", "triton", "sdpa"
    is_fused = mask is None or isinstance(mask, CausalMask) and q.shape[-2] in (1, k.shape[-2])
    return ("sdpa",) if is_fused or needs_gradients(q, k, v) else ("triton", "sdpa")


def _best(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> AttentionBackend:
    refused = []
    *preferred, last = _preferences(q, k, v, mask)
    for name in preferred:
        reasons = BACKENDS[name].objections(q, k, v, mask)
        if not reasons:
            last = name
            break
        refused.append(f"{name} {', '.join(reasons)}")
    if not torch.compiler.is_compiling():
        _log_once(last, "; ".join(refused))
    return BACKENDS[last]


def _named(name: str, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> AttentionBackend:
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; available: auto, {', '.join(BACKENDS)}")
    if reasons := BACKENDS[name].objections(q, k, v, mask):
        raise ValueError(f"attention backend {name!r} cannot run: {'; '.join(reasons)}")
    return BACKENDS[name]


@functools.cache
def _log_once(name: str, refused: str) -> None:
    logger.info("attention backend: %s%s", name, f" ({refused})" if refused else "")
