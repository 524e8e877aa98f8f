"""Where the time of drawing an image goes: `python -m vistok.eval.profiles -o FOLDER`.

Released sizes with random weights, and the shipped pipeline with its own, draw images eagerly under `torch.profiler`. The time
of all operators is summed up in groups; what is left of the time is Python, dispatch and waiting. Writes `profiles.json`,
`profiles.png` and `report.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vistok.decoding.flow_sampling import generate_flow
from vistok.decoding.guidance import ConstantGuidance, RampGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.eval.machine import describe_machine, threads_in_words
from vistok.eval.markdown import table
from vistok.eval.operator_groups import (
    GROUPS,
    OperatorTime,
    computing_calls,
    network_ranges,
    operator_times,
    shares,
)
from vistok.eval.random_weights import randomize
from vistok.eval.rate_distortion_report import DPI, check_plotting
from vistok.eval.speed_families import PROMPT, SHIPPED
from vistok.eval.speed_subjects import FLEXTOK_STEPS
from vistok.eval.speed_ways import FLOAT_TYPES
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
from vistok.hub import load_pipeline
from vistok.models.generators import llamagen, nar, xar
from vistok.models.generators.llamagen import LlamaGenClass
from vistok.models.generators.nar import NARClass
from vistok.models.generators.xar import XAR
from vistok.models.tokenizers import flextok
from vistok.tokens import Tokens

LARGEST = 5  # operators that the report names
GUIDANCE_SCALE = 2.0
FLOW_STEPS = 8  # of xAR at every cell: shares do not depend on them
FLEXTOK = "flextok-d12-d12-in1k"

Draw = Callable[[int], Any]  # number of images -> images or tokens


@dataclass(frozen=True)
class Subject:
    """What is profiled.

    Args:
        what: in words.
        build: the networks on a device, in a type, as something that draws images.
    """

    what: str
    build: Callable[[torch.device, torch.dtype], Draw]


@dataclass(frozen=True)
class Profile:
    """One subject in one type."""

    subject: str
    dtype: str
    batch_size: int
    seconds: float  # median of a batch, without the profiler
    whole_seconds: (
        float  # what shares are of: on a GPU the same, on a CPU the time of a batch under the profiler
    )
    shares: dict[str, float]  # group -> share
    calls: int  # of operators that compute, on a GPU of kernels
    largest: list[OperatorTime]  # operators with the most time


@dataclass(frozen=True)
class ProfileReport:
    """All profiles with their protocol."""

    profiles: list[Profile]
    repeats: int
    device: str
    num_threads: int
    load: (
        float | None
    )  # processes that wanted a core, on average of the last minutes; None where the system does not tell
    machine: str


def _ordered(model_class: Any, sizes: dict[str, int]) -> Callable[[torch.device, torch.dtype], Draw]:
    def build(device: torch.device, dtype: torch.dtype) -> Draw:
        model = _ready(model_class(**sizes), device, dtype)
        guidance = ConstantGuidance(GUIDANCE_SCALE)
        return lambda count: generate_ordered(
            model, torch.arange(count), streams=_streams(count), guidance=guidance
        )

    return build


def _xar(device: torch.device, dtype: torch.dtype) -> Draw:
    model = _ready(XAR(**xar.PRESETS["base"]), device, dtype)
    guidance = RampGuidance(GUIDANCE_SCALE)
    return lambda count: generate_flow(
        model,
        torch.arange(count),
        streams=_streams(count),
        num_inference_steps=FLOW_STEPS,
        guidance=guidance,
    )


def _flextok(device: torch.device, dtype: torch.dtype) -> Draw:
    tokenizer_class, sizes = flextok.PRESETS[FLEXTOK]
    tokenizer: Any = _ready(tokenizer_class(**sizes, scaling_factor=1.0), device, dtype)

    def draw(count: int) -> Any:
        indices = torch.randint(
            tokenizer.codebook_size,
            (count, tokenizer.num_tokens),
            generator=torch.Generator().manual_seed(0),
        )
        tokens = Tokens(indices=indices, codebook_size=tokenizer.codebook_size).to(device)
        return tokenizer.decode(tokens, num_inference_steps=FLEXTOK_STEPS)

    return draw


def _shipped(device: torch.device, dtype: torch.dtype) -> Draw:
    pipeline: Any = load_pipeline(SHIPPED).to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return lambda count: pipeline(PROMPT, num_images_per_prompt=count, output_type="pt")


def _ready(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return randomize(model).eval().to(device, dtype)


def _streams(count: int) -> ImageStreams:
    return ImageStreams.from_seeds(range(count))


SUBJECTS: dict[str, Subject] = {
    "llamagen-b": Subject(
        f"LlamaGen-B, 256 steps, guidance {GUIDANCE_SCALE:g}", _ordered(LlamaGenClass, llamagen.PRESETS["B"])
    ),
    "nar-b": Subject(f"NAR-B, 31 steps, guidance {GUIDANCE_SCALE:g}", _ordered(NARClass, nar.PRESETS["B"])),
    "xar-b": Subject(
        f"xAR-B, every cell in {FLOW_STEPS} flow steps, guidance at most {GUIDANCE_SCALE:g}", _xar
    ),
    "flextok": Subject(f"{FLEXTOK} decoding 256 tokens in {FLEXTOK_STEPS} guided steps", _flextok),
    SHIPPED: Subject(f"the shipped pipeline, {PROMPT!r} to pixels, its own settings", _shipped),
}


@torch.inference_mode()
def measure(name: str, device: torch.device, dtype: str, *, batch_size: int = 1, repeats: int = 3) -> Profile:
    """Profile one subject: a run that does not count, `repeats` timed ones, and one under the profiler.

    Raises:
        ValueError: an unknown subject.
    """
    if name not in SUBJECTS:
        raise ValueError(f"unknown subject {name!r}; choose from {', '.join(SUBJECTS)}")
    torch.manual_seed(0)
    draw = SUBJECTS[name].build(device, FLOAT_TYPES[dtype])

    def call() -> Any:
        return draw(batch_size)

    call()
    (seconds,) = median_seconds([call], repeats, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with network_ranges(), profile(activities=activities) as recorded:
        (profiled_seconds,) = median_seconds([call], 1, device)
    times = operator_times(recorded.events(), device)
    # The profiler slows down operators on a CPU, and the GPU's host but not its kernels.
    whole = seconds if device.type == "cuda" else profiled_seconds
    return Profile(
        subject=name,
        dtype=dtype,
        batch_size=batch_size,
        seconds=seconds,
        whole_seconds=whole,
        shares=shares(times, whole),
        calls=computing_calls(times),
        largest=times[:LARGEST],
    )


def write_report(result: ProfileReport, folder: Path) -> None:
    """Write `profiles.json`, `profiles.png` and `report.md` into an existing folder."""
    with atomic_path(folder / "profiles.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "profiles.png") as file:
        _draw_bars(result, file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(result), encoding="utf-8")


def _draw_bars(result: ProfileReport, path: Path) -> None:
    """A bar per profile, from left to right its groups. Without pyplot, so that no global state is touched."""
    from matplotlib.figure import Figure

    labels = [f"{p.subject}\n{p.dtype}, batch {p.batch_size}" for p in result.profiles]
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(labels)), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(labels)
    for number, group in enumerate(GROUPS):
        widths = [100 * p.shares[group] for p in result.profiles]
        panel.barh(labels, widths, left=left, color=f"C{number}", label=group, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel("% of the time")
    panel.tick_params(axis="y", labelsize=8)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI, format="png")


def _page(result: ProfileReport) -> str:
    header = ["Subject", "Type", "Batch", "Seconds", "Operators", *(group.capitalize() for group in GROUPS)]
    subjects = dict.fromkeys(p.subject for p in result.profiles)
    lines = [
        "# Where the time goes",
        "",
        *table(header, map(_cells, result.profiles), num_labels=3),
        "",
        "![Shares of the time](profiles.png)",
        "",
        "## Operators with the most time",
        "",
        *table(
            ["Subject", "Type", "Batch", "Operator", "Group", "Calls", "Share"],
            (row for p in result.profiles for row in _operator_cells(p)),
            num_labels=5,
        ),
        "",
        *(f"- {name}: {SUBJECTS[name].what}." for name in subjects),
        f"- Eager, without compilation. Seconds: median of {result.repeats} batches after another one, without the "
        "profiler. Operators: calls of those that compute, on a GPU their kernels, in one batch.",
        "- Groups follow from the operators, and from whether a module of a network called them; "
        "sampling and loop is what no module did: guidance, drawing, integration, caches made, noise.",
        "- Shares: on a GPU of these seconds, on a CPU of those under the profiler, where both meet the same machine. "
        "Python and launches: what no operator, on a GPU no kernel, took; on a CPU with what the profiler itself costs, "
        "so that this share is rather too large.",
        *([] if result.load is None else [_load_in_words(result.load)]),
        f"- {result.device}, {threads_in_words(result.num_threads)}; {result.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _load_in_words(load: float) -> str:
    return (
        f"- Load of the machine at the end: {load:g} processes. Where that is more than its cores, seconds are those of a busy "
        "machine and not to be compared; shares are of one run."
    )


def _cells(p: Profile) -> list[str]:
    shares_in_percent = (f"{100 * p.shares[group]:.0f} %" for group in GROUPS)
    return [*_labels(p), f"{p.seconds:.3g}", str(p.calls), *shares_in_percent]


def _operator_cells(p: Profile) -> list[list[str]]:
    return [
        [
            *_labels(p),
            f"`{time.name.replace('|', ' ')}`",
            time.group,
            str(time.calls),
            f"{100 * time.seconds / p.whole_seconds:.0f} %",
        ]
        for time in p.largest
    ]


def _labels(p: Profile) -> list[str]:
    return [p.subject, p.dtype, str(p.batch_size)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.profiles", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=list(FLOAT_TYPES), choices=FLOAT_TYPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    check_plotting()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    profiles = []
    for name in options.subjects:
        for dtype in options.dtypes:
            for batch_size in options.batch_sizes:
                one = measure(name, device, dtype, batch_size=batch_size, repeats=options.repeats)
                sys.stderr.write(f"{one}\n")
                profiles.append(one)
    result = ProfileReport(
        profiles,
        repeats=options.repeats,
        device=device.type,
        num_threads=torch.get_num_threads(),
        load=round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None,
        machine=str(describe_machine()),
    )
    write_report(result, options.out)
    sys.stdout.write(json.dumps(asdict(result), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
