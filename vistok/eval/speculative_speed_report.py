"""The times of speculative decoding as files: JSON, tables and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vistok.eval.machine import threads_in_words
from vistok.eval.markdown import table
from vistok.eval.rate_distortion_report import DPI, check_plotting
from vistok.eval.speculative_speed import Measurement, Run, SpeedReport
from vistok.files import atomic_path

MARKERS = "osD^v<>P*X"
GOAL = 1.3  # the speed-up for which the tokens per pass are told


def write_report(report: SpeedReport, folder: Path) -> None:
    """Write `speculative-speed.json`, `speculative-speed.png` and `report.md` into an existing folder."""
    with atomic_path(folder / "speculative-speed.json") as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "speculative-speed.png") as file:
        _draw(report, file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report), encoding="utf-8")


def _draw(report: SpeedReport, path: Path) -> None:
    """The cost of a pass, then the speed-up against tokens per pass; lines end where all drafts are accepted.

    A colour is a drafter, a mark how much it drafts.
    """
    check_plotting()
    from matplotlib.figure import Figure

    count = len(report.measurements)
    figure = Figure(figsize=(4.8 * (count + 1), 4.2), layout="constrained")
    costs, *panels = figure.subplots(1, count + 1, squeeze=False)[0]
    for panel, measurement in zip(panels, report.measurements, strict=True):
        nodes = [one.num_nodes for one in measurement.passes]
        costs.plot(
            nodes,
            [one.relative for one in measurement.passes],
            "o-",
            label=_title(measurement),
            markersize=3.5,
        )
        drafters = list(dict.fromkeys(run.drafter for run in measurement.runs))
        lengths = sorted({run.num_drafted for run in measurement.runs})
        for run in measurement.runs:
            ends, marker = (1, run.num_drafted + 1), MARKERS[lengths.index(run.num_drafted) % len(MARKERS)]
            style = {"color": f"C{drafters.index(run.drafter) % 10}", "linewidth": 1}
            panel.plot(ends, [run.speed_up_at(end) for end in ends], **style)
            panel.plot(run.tokens_per_pass, run.speed_up, marker, label=_name(run), **style)
        panel.axhline(1, color="0.5", linestyle=":", linewidth=1)
        panel.set_title(_title(measurement), fontsize=9)
        panel.set_xlabel("tokens per pass")
        panel.set_ylabel("speed-up; marks: measured with random weights")
        panel.legend(frameon=False, fontsize=7)
    costs.set_xlabel("nodes of a pass")
    costs.set_ylabel("time of a pass, over that of one node")
    costs.set_ylim(bottom=0)
    costs.legend(frameon=False, fontsize=8)
    for panel in (costs, *panels):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI, format="png")


def _title(measurement: Measurement) -> str:
    return f"{measurement.family}, {measurement.num_parameters / 1e6:.0f} M, {measurement.dtype}"


def _name(run: Run) -> str:
    return f"{run.drafter}, {run.num_drafted}"


def _page(report: SpeedReport) -> str:
    header = [
        "Generator",
        "Drafter",
        "Drafted",
        "ms per pass",
        "Target pass",
        "Drafting",
        "Tokens per pass",
        "Speed-up",
    ]
    header += ["Tokens to break even", f"Tokens for {GOAL}x", "If all were accepted"]
    costs = [[_title(one), *_pass_cells(one)] for one in report.measurements]
    counts = [
        f"{one.num_nodes} node{'s' if one.num_nodes > 1 else ''}" for one in report.measurements[0].passes
    ]
    threads = threads_in_words(report.num_threads)
    lines = [
        "# When speculative decoding pays",
        "",
        "![Cost of a pass, and speed-up against tokens per pass](speculative-speed.png)",
        "",
        "**Weights are random.** Times do not depend on them, but acceptance does: distributions are nearly uniform, in the "
        "generator and in the drafters, so that far more drafts are accepted than with trained models. Tokens per pass and "
        "speed-up show the mechanics; the other columns hold for any weights.",
        "",
        *table(header, [cells for one in report.measurements for cells in _run_cells(one)], num_labels=2),
        "",
        "## One pass",
        "",
        *table(["Generator", "Weights, MiB", "Plain step, ms", *counts], costs),
        "",
        f"- The first {report.num_tokens} tokens of one image, batch 1, guidance {report.guidance_scale:g}"
        f"{', two rows per image' if report.guidance_scale != 1 else ''}; the whole distribution is sampled, strict rule.",
        "- ms per pass: time of the speculative run over its passes, everything included. Target pass, drafting: of these, "
        "timed alone; what is left is accepting, drawing and bookkeeping.",
        f"- Tokens to break even, for {GOAL}x, speed-up if all were accepted: from the time per pass and that of a plain "
        "token, both measured in turns. More than one more than is drafted cannot be reached.",
        "- One pass: milliseconds over chains in the midst of an image, and over that of one node.",
        f"- Median of {report.repeats} calls in turns; {threads}, {report.device}; {report.machine}; "
        f"vistok {report.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def _pass_cells(measurement: Measurement) -> list[str]:
    times = [f"{1000 * one.seconds:.1f} ({one.relative:.2f})" for one in measurement.passes]
    return [f"{measurement.weights_mib:.0f}", f"{1000 * measurement.step_seconds:.1f}", *times]


def _run_cells(measurement: Measurement) -> list[list[str]]:
    return [
        [
            _title(measurement),
            run.drafter if not run.num_parameters else f"{run.drafter}, {run.num_parameters / 1e6:.1f} M",
            str(run.num_drafted),
            f"{1000 * run.seconds_per_pass:.1f}",
            f"{1000 * run.target_seconds:.1f}",
            f"{1000 * run.draft_seconds:.1f}",
            f"{run.tokens_per_pass:.2f}",
            f"{run.speed_up:.2f}",
            f"{run.tokens_for(1):.2f}",
            f"{run.tokens_for(GOAL):.2f}",
            f"{run.speed_up_at(run.num_drafted + 1):.2f}",
        ]
        for run in measurement.runs
    ]
