"""Time of the package's operators, each in several ways: `python -m vistok.eval.kernel_speed -o FOLDER [--device cuda]`.

Decode attention over a static cache, sampling, and the attention backends, at the sizes of released generators, beside
the plainest PyTorch and beside the least time in which the device could move their bytes or compute their products, at
rates measured in the same run. A way whose result is not the definition's gets no time. Writes `kernel-speed.json` and
`report.md`, anew after every operator.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vistok.eval.kernel_subjects import CLEAR, PLAIN, Subject, subjects
from vistok.eval.machine import describe_machine, threads_in_words
from vistok.eval.markdown import table
from vistok.eval.speed_floor import Pass, Rates, measure_rates
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_RATIO = (
    4.0  # a way's error over that of plain PyTorch: products of another order, and rounded once more
)
SMALLEST_ERROR = 1e-5  # of the largest value; below, sums in another order differ as much


@dataclass(frozen=True)
class Time:
    """An operator at one size in one way."""

    kernel: str
    setting: str
    dtype: str
    way: str
    seconds: float | None  # of a call; None: see `reason`
    least_seconds: float  # what the device needs for the bytes, or for the products
    plain_seconds: float | None
    error: float | None  # largest difference from the definition in float32; of tokens, how many are others
    reason: str = ""


@dataclass
class KernelReport:
    """All times with their protocol."""

    device: str
    rates: Rates
    repeats: int
    num_threads: int
    machine: str
    times: list[Time] = field(default_factory=list)


def measure(subject: Subject, dtype: str, rates: Rates, device: torch.device, repeats: int) -> list[Time]:
    """Check all ways of an operator and time those that compute it.

    Args:
        subject: the operator, its tensors on `device`.
        dtype: their type.
        rates: of the device.
        device: where.
        repeats: timed rounds, all ways in turns; the median counts.

    Raises:
        ValueError: the plain way is itself far from the definition.
    """
    errors, reasons = _check(subject)
    batches = [subject.inputs(seed) for seed in range(subject.num_inputs)]
    rounds: dict[str, Callable[[], Any]] = {}
    for way in subject.ways:
        if way in reasons:
            continue
        try:
            rounds[way] = _round(subject, way, batches, device)
        except Exception as raised:  # a backend that breaks here must not take the others along
            reasons[way] = _first_line(raised)
    medians = median_seconds(list(rounds.values()), repeats, device)
    seconds = {way: total / len(batches) for way, total in zip(rounds, medians, strict=True)}
    least = Pass(subject.num_bytes, subject.flops).seconds(rates, dtype)
    return [
        Time(
            kernel=subject.kernel,
            setting=subject.setting,
            dtype=dtype,
            way=way,
            seconds=seconds.get(way),
            least_seconds=least,
            plain_seconds=seconds.get(PLAIN),
            error=errors.get(way),
            reason=reasons.get(way, ""),
        )
        for way in dict.fromkeys([*subject.ways, *reasons])
    ]


def _check(subject: Subject) -> tuple[dict[str, float], dict[str, str]]:
    """The error of each way, and why a way is not timed."""
    exact = subject.exact(subject.inputs(0))
    errors, reasons = {}, dict(subject.refused)
    for way, compute in subject.ways.items():
        try:
            errors[way] = subject.difference(compute(subject.inputs(0)), exact)
        except Exception as raised:
            if way == PLAIN:
                raise
            reasons[way] = _first_line(raised)
    allowed = 0.0
    if not isinstance(exact, tuple):
        largest = exact.abs().max().item()
        if not errors[PLAIN] <= largest / 20:
            raise ValueError(
                f"{subject.kernel}, {subject.setting}: plain PyTorch is {errors[PLAIN]:.3g} off the definition, "
                f"whose largest value is {largest:.3g}; there is nothing to compare with"
            )
        allowed = LARGEST_RATIO * errors[PLAIN] + SMALLEST_ERROR * largest
    for way, error in errors.items():
        if not error <= allowed:
            reasons[way] = f"does not compute the definition: {error:.3g} off, {allowed:.3g} allowed"
    return errors, reasons


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _round(subject: Subject, way: str, batches: Sequence[Any], device: torch.device) -> Callable[[], Any]:
    """One call for each of the arguments, warmed up; on a GPU, where the subject says so, as a CUDA graph."""
    compute = subject.ways[way]

    def call_all() -> None:
        for arguments in batches:
            compute(arguments)

    if device.type != "cuda" or not subject.is_captured:
        call_all()
        return call_all
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call_all()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all()
    graph.replay()
    return graph.replay


def write_report(report: KernelReport, folder: Path) -> None:
    """Write `kernel-speed.json` and `report.md` into an existing folder."""
    with atomic_path(folder / "kernel-speed.json") as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report), encoding="utf-8")


def _page(report: KernelReport) -> str:
    lines = ["# Time of the operators", ""]
    header = ["Setting", "Type", "Way", "Microseconds", "Faster than plain", "Of the least time", "Error"]
    for kernel in dict.fromkeys(time.kernel for time in report.times):
        timed = [time for time in report.times if time.kernel == kernel and time.seconds is not None]
        lines += [f"## {kernel.capitalize()}", "", *table(header, map(_cells, timed), num_labels=3), ""]
    refused = {(time.kernel, time.way, time.reason): None for time in report.times if time.reason}
    if refused:
        lines += [
            "## Not timed",
            "",
            *(f"- {kernel}, {way}: {reason}" for kernel, way, reason in refused),
            "",
        ]
    rates = report.rates
    products = ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.matmul.items())
    lines += [
        "- Plain: of decode attention, rotation, a cache that is concatenated anew and PyTorch's SDPA; of sampling and "
        "attention, their definitions in PyTorch's operators.",
        "- Of the least time: what the device would need, at the rates below, for the bytes that must be read and written "
        "or for the products, whichever takes longer, as a share of the measured time.",
        "- Decode attention reads storage that no cache holds, one call after another over different rows of tensors; on a "
        "GPU, calls of decode attention and of sampling are nodes of a CUDA graph.",
        f"- Error: largest difference from the definition in float32; of tokens, how many are others than for uniforms "
        f"{CLEAR:g} away. Checked before anything is timed: at most {LARGEST_RATIO:g} times that of the plain way.",
        f"- Memory: read {rates.read / 1e9:.1f} GB/s, copy {rates.copy / 1e9:.1f} GB/s (bytes read and written); the larger "
        f"counts. Products: {products}.",
        f"- Median of {report.repeats} rounds after another one; {report.device}, "
        f"{threads_in_words(report.num_threads)}; {report.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(time: Time) -> list[str]:
    assert time.seconds is not None
    faster = "" if time.plain_seconds is None else f"{time.plain_seconds / time.seconds:.2f}"
    share = f"{100 * time.least_seconds / time.seconds:.0f} %"
    error = "" if time.error is None else f"{time.error:.1e}"
    return [time.setting, time.dtype, time.way, f"{1e6 * time.seconds:.1f}", faster, share, error]


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.kernel_speed", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--kernels", nargs="+", choices=["decode attention", "sampling", "attention"], help="[all]"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    report = KernelReport(
        device=device.type,
        rates=measure_rates(device, options.dtypes),
        repeats=options.repeats,
        num_threads=torch.get_num_threads(),
        machine=str(describe_machine()),
    )
    for dtype in options.dtypes:
        for subject in subjects(device, getattr(torch, dtype)):
            if options.kernels and subject.kernel not in options.kernels:
                continue
            times = measure(subject, dtype, report.rates, device, options.repeats)
            sys.stderr.write(
                "".join(f"{time.kernel}: {' | '.join(_cells(time))}\n" for time in times if time.seconds)
            )
            report.times += times
            write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
