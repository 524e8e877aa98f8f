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
    families: Annotated[
        list[str] | None, typer.Option("--family", metavar="NAME", help="Only these.")
    ] = None,
    ways: Annotated[
        list[str] | None, typer.Option("--way", metavar="NAME", help="plain, eager or compiled; only these.")
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or int8; only these."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images at a time; only these.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls; the median counts.")] = None,
    longest: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of a call; of longer ones a share of the steps is timed."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Time every family beside this machine's bandwidth and arithmetic, and beside the plainest loop.

    Options that say "only these" can be given several times.
    """
    check_folder(out if out.exists() else out.parent)
    from vistok.eval.rate_distortion_report import check_plotting
    from vistok.eval.speed import choose, run
    from vistok.eval.speed_report import write_report

    check_plotting()
    selections = choose(
        "quick" if quick else preset,
        families=families,
        ways=ways,
        dtypes=dtypes,
        batch_sizes=batch_sizes,
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
