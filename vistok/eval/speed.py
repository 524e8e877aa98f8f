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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vistok
from vistok.eval.machine import describe_machine
from vistok.eval.peak_memory import MIB
from vistok.eval.speed_bench import Bench, Prepared
from vistok.eval.speed_cells import Cell, Measurement, SpeedReport, load, save
from vistok.eval.speed_families import FAMILIES
from vistok.eval.speed_floor import measure_rates
from vistok.eval.speed_selection import PRESETS, Selection, choose
from vistok.eval.speed_ways import DTYPES, PLAIN, WAYS, UnavailableError, finish

FILE = "speed.json"
MOST_MEMORY = 0.8  # of what is free
MEMORY = Path("/proc/meminfo")  # Linux


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
        write: called after every family, and when all is measured.

    Raises:
        ParityError: a way computes something else than the plain loop. What is measured so far is kept.
        ValueError: the folder has measurements of another machine, device or version.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"times are taken on a CPU or with CUDA, not on {device!r}")
    report = load(folder / FILE) or _new_report(place)
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
            prepared = Prepared(None)
            try:
                bench.convert(dtype)
                prepared = bench.prepare(way)
                yield from _measure_sizes(bench, chosen, prepared, selection, report, progress)
            except UnavailableError as error:
                _skip(report, chosen, str(error), progress)
            finish(prepared.made)
            prepared = Prepared(None)
            _tidy()


def _measure_sizes(
    bench: Bench,
    cells: list[Cell],
    prepared: Prepared,
    selection: Selection,
    report: SpeedReport,
    progress: Any,
) -> Iterator[Measurement]:
    """Cells that differ in the batch size, rising, as far as memory allows."""
    largest: Measurement | None = None
    for position, cell in enumerate(cells):
        try:
            _check_memory(cell, largest, bench.device)
            largest = bench.measure(cell, prepared, repeats=selection.repeats, longest=selection.longest)
        except (torch.OutOfMemoryError, UnavailableError) as error:
            _skip(report, cells[position:], str(error).splitlines()[0], progress)
            return
        progress.update()
        yield largest


def _tidy() -> None:
    """Forget compiled programs, and with them copies of the weights."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    from vistok.eval.speed_report import write_report

    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="what is measured, and how")
    parser.add_argument("--quick", action="store_true", help="the same as --preset quick")
    for name, choices in (("families", FAMILIES), ("ways", (PLAIN, *WAYS)), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), metavar="NAME")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--longest", type=float, help="seconds of a call; of longer ones a share is timed")
    parser.add_argument("--device", default="cpu")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("out")
    folder.mkdir(parents=True, exist_ok=True)
    device, preset, is_quick = (options.pop(name) for name in ("device", "preset", "quick"))
    selections = choose("quick" if is_quick else preset, **options)
    report = run(selections, folder, device, write=lambda report: write_report(report, folder))
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
