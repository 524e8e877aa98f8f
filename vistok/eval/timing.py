"""Wall-clock times of several ways to compute the same, met by the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def median_seconds(
    calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> list[float]:
    """Median seconds of each call, run in turns. There is no warm-up: run the calls before."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, of_call in zip(calls, times, strict=True):
            _synchronize(torch.device(device))
            started = time.perf_counter()
            call()
            _synchronize(torch.device(device))
            of_call.append(time.perf_counter() - started)
    return [statistics.median(of_call) for of_call in times]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
