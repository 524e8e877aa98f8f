"""How fast every family is, beside what the machine allows: `python -m vistok.eval.speed -o FOLDER`, or `vistok bench`.

For every family at its released size, type of weights, batch size and way to draw: time to the first image, time per image,
tokens per second, peak memory, bytes and operations per pass. Beside them the floor, the least time in which this machine,
at the memory bandwidth and the arithmetic measured in the same run, could move these bytes and do these operations; and the
plainest eager loop over the same modules in float32. Before anything of a way is timed, it must compute what the plain loop
does. Every cell is saved when it is measured, and a run that is repeated goes on where it stopped.

Writes `speed.json`, `speed.png` and `report.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vistok
from vistok.eval.machine import describe_machine
from vistok.eval.peak_memory import MIB, peak_memory
from vistok.eval.rate_distortion_report import check_plotting
from vistok.eval.speed_floor import Pass, Rates, floor_seconds, is_bound_by_memory, measure_rates
from vistok.eval.speed_subjects import FAMILIES, Subject, build_subject
from vistok.eval.speed_ways import DTYPES, PLAIN, PLAIN_DTYPE, WAYS, UnavailableError, convert
from vistok.eval.speed_work import mean_of
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
from vistok.models.quantize import stored_bytes

FILE = "speed.json"
MOST_MEMORY = 0.8  # of what is free
MEMORY = Path("/proc/meminfo")  # Linux


@dataclass(frozen=True, order=True)
class Cell:
    """What is measured at a time."""

    family: str
    way: str
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.family}, {self.way}, {self.dtype}, batch {self.batch_size}"


@dataclass(frozen=True)
class Measurement:
    """One cell. Times are of whole batches, `share` included."""

    cell: Cell
    seconds: float  # median, of a batch
    first_seconds: float  # until the first image of a new process is there, with compilation and the like
    floor: float  # least seconds of a batch
    is_memory_bound: bool
    share: int  # a call did one in so many steps; the floor says what the others add
    num_tokens: int  # of an image
    num_passes: int
    bytes_per_pass: float
    flops_per_pass: float
    weights_mib: float
    peak_mib: float | None  # of the first call beyond the weights; None where the system does not tell
    difference: float  # of what is computed from the plain way in float32, over the largest value
    allowed: float  # the most that it may be

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.cell.batch_size

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds_per_image

    @property
    def over_floor(self) -> float:
        """How many times the floor it takes."""
        return self.seconds / self.floor


@dataclass
class SpeedReport:
    """All measurements with their protocol."""

    rates: Rates
    device: str
    machine: str
    num_threads: int
    vistok: str
    repeats: int = 0
    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # cells in words -> why they are not measured
    protocols: dict[str, str] = field(default_factory=dict)  # family -> what a call does
    parameters: dict[str, int] = field(default_factory=dict)

    def find(self, family: str, way: str, dtype: str, batch_size: int) -> Measurement | None:
        """The measurement of a cell, if there is one."""
        wanted = Cell(family, way, dtype, batch_size)
        return next((one for one in self.measurements if one.cell == wanted), None)

    def plain_of(self, cell: Cell) -> Measurement | None:
        """The plain way of the same family and batch size."""
        return self.find(cell.family, PLAIN, PLAIN_DTYPE, cell.batch_size)


@dataclass(frozen=True)
class Selection:
    """Which cells to measure, and how.

    Args:
        families, ways, dtypes, batch_sizes: all combinations; of the plain way only float32.
        repeats: timed calls; the median counts.
        longest: seconds; where a call takes longer, and can be cut, a share of its steps is timed.

    Raises:
        ValueError: something unknown, or a number below 1.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    ways: tuple[str, ...] = (PLAIN, *WAYS)
    dtypes: tuple[str, ...] = DTYPES
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    repeats: int = 3
    longest: float = 30.0

    def __post_init__(self) -> None:
        known = {"families": FAMILIES, "ways": (PLAIN, *WAYS), "dtypes": DTYPES}
        for name, choices in known.items():
            for chosen in getattr(self, name):
                if chosen not in choices:
                    raise ValueError(f"unknown {chosen!r} in {name}; choose from {', '.join(choices)}")
        if self.repeats < 1 or any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"repeats {self.repeats} and batch sizes {self.batch_sizes} must be at least 1")

    def cells(self, family: str) -> list[Cell]:
        """Those of a family in the order in which they are measured: by type, then way, then batch size."""
        return [
            Cell(family, way, dtype, size)
            for dtype in DTYPES
            for way in (PLAIN, *WAYS)
            for size in sorted(self.batch_sizes)
            if way in self.ways and dtype in ((PLAIN_DTYPE,) if way == PLAIN else self.dtypes)
        ]


class ParityError(ValueError):
    """A way does not compute what the plain loop computes."""


class Bench:
    """One family in one run; its cells are asked for by type, in the order of `DTYPES`.

    Args:
        family: name.
        rates: of the device.
        device: where.
    """

    def __init__(self, family: str, rates: Rates, device: torch.device) -> None:
        self.family = family
        self.rates = rates
        self.device = device
        self.subject: Subject = build_subject(family)
        self.subject.model.to(device)
        self.reference = self.subject.plain_outputs()  # of float32
        self.subject.passes(1, 1)  # what has to be counted, is counted in float32
        self.dtype, self.budget = PLAIN_DTYPE, self.subject.tolerance
        self.shares: dict[tuple[str, int], int] = {}  # (type, batch size) -> share of the steps that is timed

    def convert(self, dtype: str) -> None:
        """From now on in another type; what the plain loop is off in it, twice, is what a way may be off."""
        if dtype == self.dtype:
            return
        convert(self.subject, dtype)
        self.dtype = dtype
        self.budget = self.subject.tolerance + 2 * self._difference(self.subject.plain_outputs())

    def prepare(self, way: str) -> tuple[Any, float]:
        """What `Subject.draw` takes, and how far its outputs are off.

        Raises:
            UnavailableError: the family has no such way.
            ParityError: it computes something else.
        """
        if way == PLAIN:
            return None, 0.0
        model = WAYS[way](self.subject)
        difference = self._difference(self.subject.outputs(model))
        if not difference <= self.budget:
            raise ParityError(
                f"{self.family}, {way}, {self.dtype}: what it computes differs by {difference:.3g} of the largest value "
                f"from the plain loop in float32, more than {self.budget:.3g}; nothing is timed that computes something else"
            )
        return model, difference

    def _difference(self, outputs: Tensor) -> float:
        return ((outputs - self.reference).abs().max() / self.reference.abs().max()).item()

    def measure(
        self, cell: Cell, model: Any, difference: float, *, repeats: int, longest: float
    ) -> Measurement:
        """Time a cell whose `model` and `difference` are from `prepare`."""
        subject, size = self.subject, cell.batch_size

        def call(share: int) -> Any:
            return subject.draw_plain(size, share) if cell.way == PLAIN else subject.draw(model, size, share)

        share, cold = self._choose_share(call, cell, longest)
        starts: list[float] = []
        peak = peak_memory(lambda: starts.append(self._seconds(lambda: call(share))), self.device)
        if peak is not None:
            peak += (subject.state_bytes(size, 1) - subject.state_bytes(size, share)) / MIB
        (seconds,) = median_seconds([lambda: call(share)], repeats, self.device)
        passes = subject.passes(size, 1)
        whole = seconds * self._floor(size, 1) / self._floor(size, share)
        return Measurement(
            cell=cell,
            seconds=whole,
            first_seconds=whole + max(cold, starts[0] - seconds, 0.0),
            floor=self._floor(size, 1),
            is_memory_bound=is_bound_by_memory(passes, self.rates, self.dtype),
            share=share,
            num_tokens=subject.num_tokens,
            num_passes=sum(one.count for one in passes),
            bytes_per_pass=mean_of(passes, "bytes"),
            flops_per_pass=mean_of(passes, "flops"),
            weights_mib=stored_bytes(subject.model) / MIB,
            peak_mib=peak,
            difference=difference,
            allowed=self.budget,
        )

    def _choose_share(self, call: Callable[[int], Any], cell: Cell, longest: float) -> tuple[int, float]:
        """The largest share of the steps that takes no longer; and what the first call takes more than the second.

        All ways of one type and batch size have the share of the first, so that programs are compiled for one length.
        """
        shares, key = self.subject.shares, (cell.dtype, cell.batch_size)
        if len(shares) == 1:
            return shares[0], 0.0
        if key in self.shares and cell.way != PLAIN:
            return self.shares[key], 0.0
        cold, warm = (self._seconds(lambda: call(shares[-1])) for _ in range(2))
        pace = warm / self._floor(cell.batch_size, shares[-1])
        fitting = [share for share in shares if pace * self._floor(cell.batch_size, share) <= longest]
        chosen = (fitting or [shares[-1]])[0]
        if cell.way != PLAIN:
            self.shares[key] = chosen
        return chosen, max(0.0, cold - warm)

    def _seconds(self, call: Callable[[], Any]) -> float:
        return median_seconds([call], 1, self.device)[0]

    def _floor(self, size: int, share: int) -> float:
        passes: list[Pass] = self.subject.passes(size, share)
        return floor_seconds(passes, self.rates, self.dtype)


def run(
    selections: Sequence[Selection],
    folder: Path,
    device: str = "cpu",
    *,
    write: Callable[[SpeedReport], None],
) -> SpeedReport:
    """Measure all cells of all selections that `folder` does not have yet.

    Args:
        selections: a cell that several have is measured as the first says.
        folder: an existing one.
        device: where.
        write: called when all is measured.

    Raises:
        ParityError: a way computes something else than the plain loop. What is measured so far is kept.
        ValueError: the folder has measurements of another machine, device or version.
    """
    place = torch.device(device)
    report = _load(folder / FILE) or _new_report(place)
    _check_same(report, _identity(place), folder)
    report.repeats = max(selection.repeats for selection in selections)
    jobs = _missing(selections, report)
    with tqdm(total=sum(len(cells) for _, cells in jobs), unit="cell", file=sys.stderr) as progress:
        for selection, cells in jobs:
            for measured in _measure_family(selection, cells, report, place, progress):
                report.measurements.append(measured)
                report.skipped.pop(str(measured.cell), None)
                save(report, folder / FILE)
            save(report, folder / FILE)
    write(report)
    return report


def _missing(selections: Sequence[Selection], report: SpeedReport) -> list[tuple[Selection, list[Cell]]]:
    """For each selection and family the cells that are neither measured nor in an earlier selection."""
    known = {one.cell for one in report.measurements}
    jobs = []
    for selection in selections:
        for family in selection.families:
            cells = [cell for cell in selection.cells(family) if cell not in known]
            known.update(cells)
            if cells:
                jobs.append((selection, cells))
    return jobs


def _measure_family(
    selection: Selection, cells: list[Cell], report: SpeedReport, device: torch.device, progress: Any
) -> Iterator[Measurement]:
    """All cells of one family that can be measured; what cannot is noted in the report."""
    family = cells[0].family
    bench = Bench(family, report.rates, device)
    report.protocols[family] = bench.subject.protocol
    report.parameters[family] = sum(weight.numel() for weight in bench.subject.model.parameters())
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        for way in dict.fromkeys(cell.way for cell in cells if cell.dtype == dtype):
            chosen = [cell for cell in cells if (cell.dtype, cell.way) == (dtype, way)]
            progress.set_postfix_str(f"{family}, {way}, {dtype}")
            try:
                bench.convert(dtype)
                model, difference = bench.prepare(way)
                yield from _measure_sizes(bench, chosen, model, difference, selection, report, progress)
            except UnavailableError as error:
                _skip(report, chosen, str(error), progress)
            model = None
            torch.compiler.reset()  # and with it copies of the weights
            gc.collect()


def _measure_sizes(
    bench: Bench,
    cells: list[Cell],
    model: Any,
    difference: float,
    selection: Selection,
    report: SpeedReport,
    progress: Any,
) -> Iterator[Measurement]:
    """Cells that differ in the batch size, rising, as far as memory allows."""
    largest: Measurement | None = None
    for position, cell in enumerate(cells):
        try:
            _check_memory(cell, largest, bench.device)
            largest = bench.measure(
                cell, model, difference, repeats=selection.repeats, longest=selection.longest
            )
        except (torch.OutOfMemoryError, UnavailableError) as error:
            _skip(report, cells[position:], str(error).splitlines()[0], progress)
            return
        progress.update()
        yield largest


def _skip(report: SpeedReport, cells: list[Cell], reason: str, progress: Any) -> None:
    for cell in cells:
        report.skipped[str(cell)] = reason
    progress.update(len(cells))


def _check_memory(cell: Cell, smaller: Measurement | None, device: torch.device) -> None:
    """Raises UnavailableError where a batch, by the peak of a smaller one, needs more than there is."""
    free = _free_mib(device)
    if smaller is None or smaller.peak_mib is None or free is None:
        return
    needed = smaller.peak_mib * cell.batch_size / smaller.cell.batch_size
    if needed > MOST_MEMORY * free:
        raise UnavailableError(f"needs about {needed:.0f} MiB beside the weights, {free:.0f} MiB are free")


def _free_mib(device: torch.device) -> float | None:
    """Memory that is free on a GPU, or in this machine where it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    if MEMORY.is_file():
        for line in MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024
    return None


def _identity(device: torch.device) -> dict[str, Any]:
    """What all measurements of a report share."""
    return {
        "device": str(device),
        "machine": str(describe_machine()),
        "num_threads": torch.get_num_threads(),
        "vistok": vistok.__version__,
    }


def _new_report(device: torch.device) -> SpeedReport:
    return SpeedReport(measure_rates(device, DTYPES), **_identity(device))


def _check_same(report: SpeedReport, identity: dict[str, Any], folder: Path) -> None:
    for name, value in identity.items():
        if getattr(report, name) != value:
            raise ValueError(
                f"{folder} has measurements of {name} {getattr(report, name)!r}, this is {value!r}; "
                "choose another folder: times of different machines do not belong in one table"
            )


def save(report: SpeedReport, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _load(path: Path) -> SpeedReport | None:
    """The report of an earlier run, if there is one."""
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    measurements = [Measurement(**{**one, "cell": Cell(**one["cell"])}) for one in stored["measurements"]]
    return SpeedReport(**{**stored, "rates": Rates(**stored["rates"]), "measurements": measurements})


PRESETS = {
    "default": (
        Selection(families=("llamagen-b", "nar-b"), batch_sizes=(1,), repeats=2, longest=20.0),
        Selection(batch_sizes=(1,), repeats=2, longest=2.0),
    ),
    "quick": (Selection(families=("llamagen-b", "nar-b"), batch_sizes=(1,), repeats=1, longest=1.0),),
    "full": (Selection(),),
}


def choose(preset: str, **given: Any) -> list[Selection]:
    """The selections of a preset, with what is given instead of theirs; `None` is not given.

    Families that are given are measured as the first selection with them says, and all others as the last.

    Raises:
        ValueError: an unknown preset, or see `Selection`.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    changes = {name: value for name, value in given.items() if value is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    *special, general = PRESETS[preset]
    wanted = changes.get("families", general.families)
    chosen = []
    for selection in special:
        families = tuple(family for family in selection.families if family in wanted)
        chosen.append(replace(selection, **{**changes, "families": families}))
    return [*chosen, replace(general, **changes)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    from vistok.eval.speed_report import write_report

    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="two families in under two minutes")
    preset.add_argument(
        "--full", action="store_true", help="all families, batches of 1, 8 and 64, whole images"
    )
    for name, choices in (("families", FAMILIES), ("ways", (PLAIN, *WAYS)), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), metavar="NAME")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--longest", type=float, help="seconds of a call; of longer ones a share is timed")
    parser.add_argument("--device", default="cpu")
    options = vars(parser.parse_args(arguments))
    check_plotting()
    folder = options.pop("out")
    folder.mkdir(parents=True, exist_ok=True)
    device, preset, is_quick = (options.pop(name) for name in ("device", "preset", "quick"))
    selections = choose("quick" if is_quick else preset, **options)
    report = run(selections, folder, device, write=lambda report: write_report(report, folder))
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
