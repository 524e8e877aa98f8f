"""The one entry to attention: `attention(q, k, v, mask, backend="auto")`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

from torch import Tensor

from vistok.kernels.attention.backends import BACKENDS, AttentionBackend
from vistok.kernels.attention.masks import AttentionMask, PackedMask

PACKED_ORDER = ("xformers", "sdpa")  # sdpa needs a call for each sequence

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

    Args:
        q: `[b h q d]`.
        k: `[b h k d]`.
        v: `[b h k d]`.
        mask: which pairs may attend; `None` means all.
        scale: factor on the logits, `d ** -0.5` by default.
        backend: `"auto"` takes the one set by `attention_backend`, else the first backend without objections;
            a name runs that backend or raises.

    Returns:
        `[b h q d]`.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run this call (the reasons are listed).
    """
    name = _preferred.get() if backend == "auto" else backend
    return _choose(q, mask, name)(q, k, v, mask, scale)


def _choose(q: Tensor, mask: AttentionMask | None, name: str) -> AttentionBackend:
    if name == "auto":
        names = PACKED_ORDER if isinstance(mask, PackedMask) else tuple(BACKENDS)
        backend = next(BACKENDS[name] for name in names if not BACKENDS[name].objections(q, mask))
        _log_once(backend.name)
        return backend
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; available: auto, {', '.join(BACKENDS)}")
    if reasons := BACKENDS[name].objections(q, mask):
        raise ValueError(f"attention backend {name!r} cannot run: {'; '.join(reasons)}")
    return BACKENDS[name]


@functools.cache
def _log_once(name: str) -> None:
    logger.info("attention backend: %s", name)
