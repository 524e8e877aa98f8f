"""Proof on the CPU that code would not make an accelerator wait: nothing is read on the host, no shape depends on values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS_VALUES = {
    "_local_scalar_dense",
    "allclose",
    "equal",
    "is_nonzero",
    "multinomial",
}  # the last checks its weights
SIZED_BY_VALUES = {
    "_unique",
    "_unique2",
    "bincount",
    "histc",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
INDEXES = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"}
# These reach the memory of a tensor on the CPU without an operator that a dispatch mode would see.
COPIES_TO_HOST = {"tolist", "numpy", "__array__", "cpu"}


class HostSyncError(AssertionError):
    """A value came to the host, or a shape depends on values, which amounts to the same."""


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside the block, whatever would make the host wait for an accelerator raises `HostSyncError`.

    `item`, `bool`, `int`, `tolist`, `cpu`, `equal`, `nonzero`, `unique`, indexing with a boolean tensor and the like
    are found out. Copies from the host, as those of random numbers drawn there, are fine.
    """
    with _NoCopiesToHost(), _NoReads():
        yield


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS_VALUES:
            raise HostSyncError(f"{name} reads values on the host; keep them in tensors")
        if name in SIZED_BY_VALUES or (name == "repeat_interleave" and _lacks_size(args, kwargs)):
            raise HostSyncError(
                f"the shape of what {name} gives depends on values; mask instead of selecting"
            )
        if name in INDEXES and any(_is_boolean(index) for index in args[1]):
            raise HostSyncError(f"{name} with a boolean index selects by values; use where or masked_fill")
        return func(*args, **(kwargs or {}))


class _NoCopiesToHost(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES_TO_HOST and args and isinstance(args[0], Tensor):
            raise HostSyncError(f"Tensor.{name} copies to the host; keep values in tensors")
        return func(*args, **(kwargs or {}))


def _is_boolean(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _lacks_size(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Of `repeat_interleave` with a tensor of counts: whether nobody says how many elements there will be."""
    return (kwargs or {}).get("output_size") is None and isinstance(args[-1], Tensor)
