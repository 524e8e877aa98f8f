"""What the operators of a profile are for: shares of the time per group, from the events of `torch.profiler`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import record_function

NETWORK = "vistok: network"  # the range that `network_ranges` opens
MATMUL, CONVOLUTION, ATTENTION = "matrix products", "convolutions", "attention"
ELEMENTWISE, SAMPLING, OVERHEAD = "norms, elementwise, copies", "sampling and loop", "Python and launches"
GROUPS = (MATMUL, CONVOLUTION, ATTENTION, ELEMENTWISE, SAMPLING, OVERHEAD)

MATMUL_OPERATORS = {
    f"aten::{name}" for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "_scaled_mm")
}
CONVOLUTION_OPERATORS = {"aten::conv2d", "aten::conv_transpose2d", "aten::convolution"}
# Nothing of them is computed: they make another view of a tensor, or take memory.
VIEWS = {
    f"aten::{name}"
    for name in (
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "broadcast_to",
        "chunk",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "narrow",
        "permute",
        "reshape",
        "resize_",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    )
}


@dataclass(frozen=True)
class OperatorTime:
    """All calls of one operator; its own time without that of operators that it calls."""

    name: str
    group: str
    calls: int
    seconds: float


@contextmanager
def network_ranges() -> Iterator[None]:
    """Mark what happens inside of modules in profiles: the outermost call of a module is a range named `NETWORK`."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        entered = None if open_ranges else record_function(NETWORK)
        if entered is not None:
            entered.__enter__()
        open_ranges.append(entered)

    def leave(*_: Any) -> None:
        left = open_ranges.pop()
        if left is not None:
            left.__exit__(None, None, None)

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def operator_times(events: Sequence[Any], device: torch.device) -> list[OperatorTime]:
    """Time by operator, the longest first: of the operators themselves on the CPU, of their kernels on a GPU.

    Args:
        events: of a finished profile inside `network_ranges`, `profile.events()`.
        device: on which the work was done.
    """
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        for name, microseconds in _parts(event, device):
            key = name, _group(event, name)
            seconds[key] += microseconds / 1e6
            calls[key] += 1
    times = [OperatorTime(*key, calls[key], spent) for key, spent in seconds.items()]
    return sorted(times, key=lambda time: -time.seconds)


def _parts(event: Any, device: torch.device) -> Iterator[tuple[str, float]]:
    """Names and microseconds of what one event computed itself."""
    if device.type == "cuda":
        for kernel in event.kernels:
            if kernel.name != NETWORK:  # the shadow of a range
                yield (event.name if event.name.startswith("aten::") else kernel.name), kernel.duration
    elif event.name != NETWORK and not event.name.startswith("ProfilerStep"):
        yield event.name, event.self_cpu_time_total


def _group(event: Any, name: str) -> str:
    """By the operator that asked for it, the outermost that is telling."""
    names = {name}
    while event is not None:
        names.add(event.name)
        event = event.cpu_parent
    if any("attention" in name or "fmha" in name for name in names):
        return ATTENTION
    if names & MATMUL_OPERATORS:
        return MATMUL
    if names & CONVOLUTION_OPERATORS:
        return CONVOLUTION
    return ELEMENTWISE if NETWORK in names else SAMPLING


def computing_calls(times: Sequence[OperatorTime]) -> int:
    """Calls of operators but views; those that only call others are counted too."""
    return sum(time.calls for time in times if time.name not in VIEWS)


def shares(times: Sequence[OperatorTime], wall_seconds: float) -> dict[str, float]:
    """The share of each of `GROUPS` of the wall time; what no operator took is `OVERHEAD`.

    Where operators took more than the wall time, which happens as the profiler slows them down, there is no overhead.
    """
    spent = dict.fromkeys(GROUPS, 0.0)
    for time in times:
        spent[time.group] += time.seconds
    spent[OVERHEAD] = max(0.0, wall_seconds - sum(spent.values()))
    total = sum(spent.values())
    return {group: seconds / total for group, seconds in spent.items()}
