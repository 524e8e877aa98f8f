"""The least time a machine needs: the bytes of a computation at its memory's pace, or the sums at that of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vistok.eval.timing import median_seconds

BYTES = {"cpu": 2**30, "cuda": 2**32}  # of a copy; far beyond every cache
MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square matrices
REPEATS = 5
COMPUTED_IN = {"int8": "bfloat16"}  # weights are int8, the rest is not


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, with the threads of the measurement: the best of several runs."""

    read: float  # bytes, in the sum of a large tensor
    copy: float  # bytes read and bytes written
    matmul: dict[str, float]  # type -> floating-point operations

    @property
    def bandwidth(self) -> float:
        """The larger of both, which gives the least time."""
        return max(self.read, self.copy)

    def matmul_of(self, dtype: str) -> float:
        """The rate of the type that a model of `dtype` computes in."""
        return self.matmul[COMPUTED_IN.get(dtype, dtype)]


@dataclass(frozen=True)
class Pass:
    """`count` equal runs through a network, or a part of one."""

    bytes: float
    flops: float
    count: int = 1

    def seconds(self, rates: Rates, dtype: str) -> float:
        """The least time of all of them."""
        return self.count * max(self.bytes / rates.bandwidth, self.flops / rates.matmul_of(dtype))


def floor_seconds(passes: Iterable[Pass], rates: Rates, dtype: str) -> float:
    """The least time of passes one after the other."""
    return sum(one.seconds(rates, dtype) for one in passes)


def is_bound_by_memory(passes: Sequence[Pass], rates: Rates, dtype: str) -> bool:
    """Whether the bytes take longer than the sums, over all passes."""
    num_bytes, flops = (sum(one.count * getattr(one, name) for one in passes) for name in ("bytes", "flops"))
    return num_bytes / rates.bandwidth > flops / rates.matmul_of(dtype)


def measure_rates(
    device: torch.device,
    dtypes: Iterable[str],
    *,
    num_bytes: int | None = None,
    sizes: Sequence[int] | None = None,
    repeats: int = REPEATS,
) -> Rates:
    """Read and copy `num_bytes`, and multiply square matrices of `sizes` in every type.

    Args:
        device: where.
        dtypes: names of types of torch, or those of `COMPUTED_IN`.
        num_bytes: of the tensor; `BYTES` by default.
        sizes: `MATMUL_SIZES` by default; the best one counts.
        repeats: of each, after one that does not count; the fastest one counts.
    """
    read, copy = _memory_rates(num_bytes or BYTES[device.type], repeats, device)
    sizes = MATMUL_SIZES[device.type] if sizes is None else sizes
    names = dict.fromkeys(COMPUTED_IN.get(name, name) for name in dtypes)
    matmul = {
        name: max(_matmul_rate(size, getattr(torch, name), repeats, device) for size in sizes)
        for name in names
    }
    return Rates(read, copy, matmul)


def _memory_rates(num_bytes: int, repeats: int, device: torch.device) -> tuple[float, float]:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    read = _fastest(source.sum, repeats, device)
    copy = _fastest(lambda: target.copy_(source), repeats, device)
    return num_bytes / read, 2 * num_bytes / copy


def _matmul_rate(size: int, dtype: torch.dtype, repeats: int, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: F.linear(left, right), repeats, device)


def _fastest(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    call()
    return min(median_seconds([call], 1, device)[0] for _ in range(repeats))
