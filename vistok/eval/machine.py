"""Which machine a number was measured on, in words that identify the hardware and not its owner."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")  # Linux names the processor here; `platform` often does not


@dataclass(frozen=True)
class Machine:
    """Hardware and versions; `str(machine)` is one line for a table's caption."""

    cpu: str
    cores: int  # that this process may use
    memory_gib: float | None  # physical memory; None where the system does not tell
    gpu: str | None
    torch: str
    python: str
    system: str

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        memory = [] if self.memory_gib is None else [f"{self.memory_gib:.0f} GiB RAM"]
        parts = [f"{self.cpu} ({cores})", *memory, self.gpu or "no GPU"]
        return ", ".join([*parts, f"torch {self.torch}", f"Python {self.python}", self.system])


def threads_in_words(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'s' if count != 1 else ''}"


def describe_machine() -> Machine:
    """The machine that this process runs on; a GPU is named only if torch can use it."""
    return Machine(
        cpu=_cpu_name(),
        cores=_usable_cores(),
        memory_gib=_memory_gib(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu_name() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
