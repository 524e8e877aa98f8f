"""How much memory a call needs at its peak, beyond what was there before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of the resident set size, see proc(5)


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak of a call in MiB beyond what was in use: resident memory of this process, or a GPU's tensors.

    `None` where the system does not tell (a CPU outside Linux, or no permission to reset the peak).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    if not _reset_peak():
        call()
        return None
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / MIB


def _reset_peak() -> bool:
    """Give freed memory back to the system and forget the peak so far."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.is_file() else None
    if trim is None:
        return False
    trim(0)
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"{STATUS} has no {field}")
