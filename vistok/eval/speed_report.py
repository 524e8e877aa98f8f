"""The times of all families as files: tables, aims and a plot of time beside the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vistok.eval.machine import threads_in_words
from vistok.eval.markdown import table
from vistok.eval.peak_memory import MIB
from vistok.eval.rate_distortion_report import DPI
from vistok.eval.speed_cells import Measurement, SpeedReport
from vistok.eval.speed_ways import DTYPES, PLAIN, WAYS
from vistok.files import atomic_path

PICTURE = "speed.png"
LABELS = ["Family", "Way", "Type", "Batch"]
COLOURS = {"float32": "C0", "bfloat16": "C1", "int8": "C2"}
MARKERS = {PLAIN: "x", "eager": "o", "compiled": "D"}


@dataclass(frozen=True)
class Aim:
    """Something that the measurements shall show.

    Args:
        text: what.
        value: from a report; `None` where it was not measured.
        goal: the least that `value` shall be, or the most.
        is_most: whether `goal` is the most.
    """

    text: str
    value: Callable[[SpeedReport], float | None]
    goal: float
    is_most: bool = False

    def cells(self, report: SpeedReport) -> list[str]:
        """A row of the table."""
        value = self.value(report)
        if value is None:
            return [self.text, self._goal, "not measured", ""]
        is_met = value <= self.goal if self.is_most else value >= self.goal
        return [self.text, self._goal, f"{value:.2f}", "yes" if is_met else "no"]

    @property
    def _goal(self) -> str:
        return f"{'at most' if self.is_most else 'at least'} {self.goal:g}"


def _best(report: SpeedReport, family: str, dtype: str, batch_size: int = 1) -> Measurement | None:
    """The fastest way."""
    found = [report.find(family, way, dtype, batch_size) for way in WAYS]
    return min((one for one in found if one is not None), key=lambda one: one.seconds, default=None)


def _speed_up(family: str, dtype: str) -> Callable[[SpeedReport], float | None]:
    """Of a single image, over the plain way."""

    def value(report: SpeedReport) -> float | None:
        best = _best(report, family, dtype)
        return None if best is None else _faster_than_plain(report, best)

    return value


def _over_floor(family: str, batch_size: int = 1) -> Callable[[SpeedReport], float | None]:
    def value(report: SpeedReport) -> float | None:
        best = _best(report, family, "bfloat16", batch_size)
        return None if best is None else best.over_floor

    return value


def _faster(family: str, other: str) -> Callable[[SpeedReport], float | None]:
    """How many times faster a family is than another, each in bfloat16 in its best way."""

    def value(report: SpeedReport) -> float | None:
        first, second = (_best(report, name, "bfloat16") for name in (family, other))
        return None if first is None or second is None else second.seconds / first.seconds

    return value


AIMS = {
    "cpu": [
        Aim(
            "LlamaGen-B, bfloat16, one image: faster than the plain way",
            _speed_up("llamagen-b", "bfloat16"),
            2,
        ),
        Aim("LlamaGen-B, bfloat16, one image: times the floor", _over_floor("llamagen-b"), 2, True),
        Aim("NAR-B, bfloat16, one image: faster than LlamaGen-B", _faster("nar-b", "llamagen-b"), 4),
        *(
            Aim(f"{family}, float32, 20 steps: faster than the plain way", _speed_up(family, "float32"), 2)
            for family in ("flextok-d12-d12", "flextok-d12-d12-32-tokens")
        ),
    ],
    "cuda": [
        *(
            Aim(f"{name}, bfloat16, one image: times the floor", _over_floor(name), 2.5, True)
            for name in ("llamagen-b", "llamagen-l", "llamagen-xl")
        ),
        *(
            Aim(f"{name}, bfloat16, 64 images: times the floor", _over_floor(name, 64), 2, True)
            for name in ("llamagen-b", "llamagen-l", "llamagen-xl")
        ),
        Aim("NAR-B, bfloat16, one image: faster than LlamaGen-B", _faster("nar-b", "llamagen-b"), 5),
    ],
}


def write_report(report: SpeedReport, folder: Path) -> None:
    """Write `report.md` and, where matplotlib is installed, `speed.png` into an existing folder, beside `speed.json`."""
    if find_spec("matplotlib") is not None:
        with atomic_path(folder / PICTURE) as file:
            _draw(report, file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report, (folder / PICTURE).is_file()), encoding="utf-8")


def _draw(report: SpeedReport, path: Path) -> None:
    """Seconds per image of every family, a panel for each batch size; a bar is the floor of its colour's type."""
    from matplotlib.figure import Figure

    sizes = sorted({one.cell.batch_size for one in report.measurements}) or [1]
    families = [
        name for name in report.protocols if any(one.cell.family == name for one in report.measurements)
    ]
    figure = Figure(figsize=(max(6, 2.5 + 0.5 * len(families)), 3.6 * len(sizes) + 1), layout="constrained")
    panels = figure.subplots(len(sizes), 1, squeeze=False)[:, 0]
    for panel, size in zip(panels, sizes, strict=True):
        for one in report.measurements:
            if one.cell.batch_size == size:
                _draw_cell(panel, families.index(one.cell.family), one)
        panel.set_yscale("log")
        panel.set_xticks(range(len(families)), families, rotation=40, ha="right", fontsize=8)
        panel.set_ylabel(f"seconds per image, batch {size}")
        panel.grid(alpha=0.3, axis="y")
    panels[0].legend(handles=_legend(), frameon=False, fontsize=8, ncols=3)
    figure.savefig(path, dpi=DPI, format="png")


def _draw_cell(panel: Any, place: int, one: Measurement) -> None:
    number = DTYPES.index(one.cell.dtype)
    x, colour = place + 0.22 * (number - 1), COLOURS[one.cell.dtype]
    size = one.cell.batch_size
    panel.hlines(one.floor / size, x - 0.1, x + 0.1, color=colour, linewidth=2)
    panel.plot(x, one.seconds_per_image, MARKERS[one.cell.way], color=colour, markersize=5, fillstyle="none")


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    ways = [
        Line2D([], [], color="0.3", marker=marker, linestyle="", fillstyle="none", label=way)
        for way, marker in MARKERS.items()
    ]
    dtypes = [
        Line2D([], [], color=colour, linewidth=2, label=f"floor, {name}") for name, colour in COLOURS.items()
    ]
    return [*ways, *dtypes]


def _page(report: SpeedReport, has_picture: bool) -> str:
    place = report.device.partition(":")[0]
    times = ["Seconds per image", "First image, s", "Tokens/s", "Floor, s", "Times the floor", "Bound by"]
    times += ["Faster than plain", "Difference"]
    work = [
        "Weights, MiB",
        "Peak beside them, MiB",
        "Passes",
        "MiB per pass",
        "GFLOP per pass",
        "Steps timed",
    ]
    rows = sorted(report.measurements, key=lambda one: _place(report, one))
    lines = [
        f"# How fast, beside what the machine allows ({report.device})",
        "",
        *([f"![Seconds per image beside the floor]({PICTURE})", ""] if has_picture else []),
        "## Aims",
        "",
        *table(["Aim", "Goal", "Measured", "Met"], [aim.cells(report) for aim in AIMS.get(place, [])]),
        "",
        "## Time",
        "",
        *table(LABELS + times, [_labels(one) + _time_cells(report, one) for one in rows], num_labels=4),
        "",
        "## Memory and work",
        "",
        *table(LABELS + work, [_labels(one) + _work_cells(one) for one in rows], num_labels=4),
        "",
        *_notes(report),
    ]
    return "\n".join(lines) + "\n"


def _place(report: SpeedReport, one: Measurement) -> tuple[int, int, int, int]:
    """Where a measurement stands: by family, batch size, type, way."""
    cell = one.cell
    ways, families = (PLAIN, *WAYS), list(report.protocols)
    return families.index(cell.family), cell.batch_size, DTYPES.index(cell.dtype), ways.index(cell.way)


def _labels(one: Measurement) -> list[str]:
    return [one.cell.family, one.cell.way, one.cell.dtype, str(one.cell.batch_size)]


def _time_cells(report: SpeedReport, one: Measurement) -> list[str]:
    speed_up = _faster_than_plain(report, one)
    return [
        f"{one.seconds_per_image:.3g}",
        f"{one.first_seconds:.3g}",
        f"{one.tokens_per_second:.3g}",
        f"{one.floor / one.cell.batch_size:.3g}",
        f"{one.over_floor:.2f}",
        "memory" if one.is_memory_bound else "arithmetic",
        "-" if speed_up is None else f"{speed_up:.2f}",
        "-" if one.cell.way == PLAIN else f"{one.difference:.1e}",
    ]


def _faster_than_plain(report: SpeedReport, one: Measurement) -> float | None:
    plain = report.plain_of(one.cell)
    return None if plain is None else plain.seconds / one.seconds


def _work_cells(one: Measurement) -> list[str]:
    return [
        f"{one.weights_mib:.0f}",
        "-" if one.peak_mib is None else f"{one.peak_mib:.0f}",
        str(one.num_passes),
        f"{one.bytes_per_pass / MIB:.4g}",
        f"{one.flops_per_pass / 1e9:.4g}",
        "all" if one.share == 1 else f"1 in {one.share}",
    ]


def _notes(report: SpeedReport) -> list[str]:
    rates = report.rates
    matmul = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.matmul.items())
    return [
        "- What is drawn: "
        + "; ".join(
            f"{family} ({report.parameters[family] / 1e6:.0f} M parameters): {protocol}"
            for family, protocol in report.protocols.items()
        )
        + ". Generators draw tokens, without a tokenizer; class-conditional for 256 pixels where the name does not say "
        "otherwise. Weights are random but for those that ship: time does not depend on them.",
        f"- Floor: for every pass the larger of two times, its bytes at {rates.bandwidth / 1e9:.1f} GB/s (read "
        f"{rates.read / 1e9:.1f}, copied {rates.copy / 1e9:.1f}, read and written bytes counted) and its operations at "
        f"the pace of square matrices ({matmul}); all measured in the same run. Bytes: weights without tables of "
        "embeddings, keys and values that are read, logits. int8: of the weights alone. Weights that fit into the "
        "processor's caches are read faster than that: a small model can be below its floor.",
        "- Plain: float32, eager, the same modules. Next-token and next-neighbor: keys and values concatenated in every "
        "step, torch's attention, `multinomial`. Masked: both branches one after the other, attention written out. "
        "Continuous: nothing kept between evaluations. Tokenizers: attention written out; FlexTok: two passes over all "
        "registers per step. Faster than plain: at the same batch size.",
        "- Difference: of logits, tokens or pixels on given inputs from those of the plain way in float32, root mean "
        "square, over that of the latter; at most twice what the plain way in that type is off, and nothing is timed "
        "that is off further.",
        "- Steps timed: where a call would take too long, it is cut to a share of its steps, and its time multiplied by "
        "what the floor of the whole is over that of the share.",
        "- First image: a whole call, and what the first of its kind takes more than a later one: compilation, if it is "
        "not in Inductor's cache, and all else that later calls find ready. Loading weights is not part of it. Peak: memory "
        "of a first call beside the weights of the model. Compiled ways on a CPU hold the weights a second time, packed.",
        *(f"- Not measured: {cells}: {reason}." for reason, cells in _skipped(report).items()),
        f"- Median of up to {report.repeats} calls; {threads_in_words(report.num_threads)}; {report.device}; "
        f"{report.machine}; vistok {report.vistok}.",
    ]


def _skipped(report: SpeedReport) -> dict[str, str]:
    """Reason -> the cells that it is about."""
    cells: dict[str, list[str]] = {}
    for cell, reason in report.skipped.items():
        cells.setdefault(reason.rstrip("."), []).append(cell)
    return {reason: "; ".join(names) for reason, names in cells.items()}
