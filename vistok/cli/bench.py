"""`vistok bench`: how fast every family is on this machine, beside what the machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.options import Device, choose_device
from vistok.cli.output import check_folder, report

PRESET_HELP = (
    "quick: LlamaGen-B and NAR-B in about two minutes on two cores. default: every family, one image. "
    "full: batches of 1, 8 and 64, hours on a CPU."
)


def bench(
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Tables and plot; an earlier run goes on."),
    ],
    preset: Annotated[str, typer.Option(help=PRESET_HELP)] = "default",
    quick: Annotated[bool, typer.Option("--quick", help="The same as --preset quick.")] = False,
    families: Annotated[str | None, typer.Option(metavar="A,B", help="Only these.")] = None,
    ways: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these of plain, eager and compiled.")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these of float32, bfloat16 and int8 weights.")
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(metavar="N,M", help="Images at a time.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls; the median counts.")] = None,
    longest: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of a call; of longer ones a share of the steps is timed."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Time every family beside this machine's bandwidth and arithmetic, and beside the plainest loop."""
    check_folder(out if out.exists() else out.parent)
    from vistok.eval.speed import run
    from vistok.eval.speed_report import write_report
    from vistok.eval.speed_selection import choose

    selections = choose(
        "quick" if quick else preset,
        families=_several(families),
        ways=_several(ways),
        dtypes=_several(dtypes),
        batch_sizes=_numbers(batch_sizes),
        repeats=repeats,
        longest=longest,
    )
    out.mkdir(exist_ok=True)
    measured = run(selections, out, choose_device(device), write=lambda result: write_report(result, out))
    report(
        "bench",
        output=str(out),
        num_cells=len(measured.measurements),
        skipped=measured.skipped,
        machine=measured.machine,
        device=measured.device,
    )


def _several(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _numbers(text: str | None) -> tuple[int, ...] | None:
    parts = _several(text)
    if parts is None:
        return None
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"batch sizes are whole numbers with commas between them, such as 1,8; got {text!r}")
    return tuple(int(part) for part in parts)
