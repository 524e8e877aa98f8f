"""A measurement of speculative decoding as files: JSON, a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistok.eval.machine import threads_in_words
from vistok.eval.markdown import table
from vistok.eval.rate_distortion_report import DPI, check_plotting
from vistok.eval.speculative import (
    JSON_FILE,
    NUM_NODES,
    NUM_PLAIN,
    NUM_WATCHED,
    PlainRow,
    Protocol,
    Quality,
    Report,
    Row,
)
from vistok.files import atomic_path

MARKERS = "osD^v<>P*X"
NOTHING = "–"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `speculative.png` and `report.md` beside the JSON file in `folder`; returns the paths of all three.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    picture, page = folder / "speculative.png", folder / "report.md"
    with atomic_path(picture) as file:
        _draw(report, file)
    with atomic_path(page) as file:
        file.write_text(_page(report, picture.name), encoding="utf-8")
    return [folder / JSON_FILE, picture, page]


def title(row: Row) -> str:
    """The drafter, with the size of its network."""
    return row.drafter if row.num_parameters == 0 else f"{row.drafter}, {row.num_parameters / 1e6:.2g} M"


def _draw(report: Report, path: Path) -> None:
    """Tokens per pass against speed-up, and against quality where that was measured; hollow marks are not lossless."""
    check_plotting()
    from matplotlib.figure import Figure

    batch_sizes = report.protocol.batch_sizes
    measured = [row for row in report.plain if row.quality is not None]
    figure = Figure(figsize=(5.2 * (len(batch_sizes) + bool(measured)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(batch_sizes) + bool(measured), squeeze=False)[0]
    for number, batch_size in enumerate(batch_sizes):
        _scatter(panels[number], report.rows, [row.timings[number].speed_up for row in report.rows])
        panels[number].axhline(1, color="0.5", linestyle=":", linewidth=1)
        panels[number].set_ylabel(f"speed-up over plain decoding, batch {batch_size}")
    if measured:
        distances = [row.quality.frechet_distance for row in measured if row.quality is not None]
        _scatter(panels[-1], report.rows, [_distance(row.quality) for row in report.rows])
        panels[-1].axhspan(min(distances), max(distances), color="0.85", label="plain decoding")
        panels[-1].set_ylabel("Fréchet distance from real images")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI, format="png")


def _scatter(panel: Any, rows: list[Row], values: list[float]) -> None:
    drafters = list(dict.fromkeys(title(row) for row in rows))
    for row, value in zip(rows, values, strict=True):
        number = drafters.index(title(row))
        is_first = next(one for one in rows if title(one) == title(row)) is row
        panel.plot(
            row.tokens_per_pass,
            value,
            MARKERS[number % len(MARKERS)],
            color=f"C{number % 10}",
            markerfacecolor=f"C{number % 10}" if row.is_lossless else "none",
            label=title(row) if is_first else None,
        )
    panel.set_xlabel("tokens per pass")
    panel.grid(alpha=0.3)


def _distance(quality: Quality | None) -> float:
    return float("nan") if quality is None else quality.frechet_distance


def _page(report: Report, picture: str) -> str:
    batch_sizes = report.protocol.batch_sizes
    header = ["Drafter", "Tree", "Rule", "Tokens per pass", "Passes saved"]
    header += [f"Speed-up, batch {size}" for size in batch_sizes]
    header += ["p-value", "Total variation", "Recognised", "Fréchet distance"]
    plain = [_plain_cells(row, len(batch_sizes)) for row in report.plain]
    passes = [
        [title(row), row.tree, row.rule, *(_passes_cell(row, number) for number in range(len(batch_sizes)))]
        for row in report.rows
    ]
    lines = [
        f"# Speculative decoding of {report.protocol.model}",
        "",
        f"![Tokens per pass against speed-up and quality]({picture})",
        "",
        *table(header, [*plain, *map(_cells, report.rows)], num_labels=3),
        "",
        "## Passes and time",
        "",
        "Of the generator and of the drafter for a batch, and milliseconds per image with and without speculation.",
        "",
        *table(["Drafter", "Tree", "Rule", *(f"Batch {size}" for size in batch_sizes)], passes, num_labels=3),
        "",
        *_notes(report.protocol, report.plain),
    ]
    return "\n".join(lines) + "\n"


def _plain_cells(row: PlainRow, num_batches: int) -> list[str]:
    name = f"plain, seeds from {row.first_seed}"
    return [
        name,
        "",
        "",
        "1.00",
        "0 %",
        *["1.00"] * num_batches,
        _p_value(row.laws.p_value),
        NOTHING,
        *_quality(row.quality),
    ]


def _cells(row: Row) -> list[str]:
    mean, largest = row.mean_variation, row.largest_variation
    return [
        title(row),
        row.tree,
        row.rule if row.is_lossless else f"{row.rule}, lossy",
        f"{row.tokens_per_pass:.2f}",
        f"{100 * row.passes_saved:.0f} %",
        *(f"{timing.speed_up:.2f}" for timing in row.timings),
        _p_value(row.laws.p_value),
        NOTHING if mean is None or largest is None else f"{mean:.3f}, at most {largest:.3f}",
        *_quality(row.quality),
    ]


def _passes_cell(row: Row, number: int) -> str:
    timing = row.timings[number]
    times = f"{1000 * timing.seconds:.0f} / {1000 * timing.plain_seconds:.0f} ms"
    return f"{timing.target_passes:.1f} + {timing.draft_passes:.1f}, {times}"


def _p_value(value: float) -> str:
    return "< 1e-6" if value < 1e-6 else f"{value:.2g}"


def _quality(quality: Quality | None) -> list[str]:
    if quality is None:
        return [NOTHING, NOTHING]
    share = NOTHING if quality.recognised is None else str(quality.recognised)
    return [share, f"{quality.frechet_distance:.2f}"]


def _notes(protocol: Protocol, plain: list[PlainRow]) -> list[str]:
    sampling = ", ".join(f"{name} {value}" for name, value in protocol.sampling.items())
    threads = threads_in_words(protocol.num_threads)
    quality = (
        "not measured" if protocol.real is None else f"{protocol.extractor} features against {protocol.real}"
    )
    return [
        f"- Images: {protocol.num_images}, of {protocol.num_tokens} tokens each; {sampling}; {protocol.dtype}.",
        f"- The generator's distributions: {_mean([row.laws.entropy for row in plain]):.2f} bits, mean over the tokens of "
        f"plain decoding; of {100 * _mean([row.laws.certain_share for row in plain]):.0f} % of the tokens there was no "
        "choice.",
        f"- Plain decoding: {NUM_PLAIN} times with other seeds each; how far these rows are apart is what chance does.",
        "- Tokens per pass: over all images, the first token, which the condition gives, not counted. A pass reads the "
        "tree with both branches of guidance. In a batch every image goes on at its own pace, and the batch takes as many "
        "passes as its slowest image.",
        f"- Speed-up: the same {protocol.num_timed} images to their tokens with and without speculation in turns, median "
        f"of {protocol.repeats}; {threads}.",
        "- p-value: that the tokens follow the generator. Each token's place in the generator's own distribution, the most "
        "probable ids first, is uniform and independent of the others if they do; chi-square test of disjoint pairs of successive "
        "tokens, all images and positions. A row that follows it falls below 0.01 once in a hundred.",
        "- Total variation, of lossy rules: of the token that comes out against the generator's distribution, mean and "
        f"largest of about {NUM_NODES} nodes in {NUM_WATCHED} images; computed, not sampled, for deterministic drafts "
        "together, and for drawn ones as if the first was the only one.",
        "- Recognised: the nearest real image has the subcategory that was asked for. Fréchet distance: "
        f"{quality}; of few images it is far too large, and comparable at the same number only.",
        f"- Generator {protocol.generator}, tokenizer {protocol.tokenizer}.",
        f"- Machine: {protocol.machine}; vistok {protocol.vistok}.",
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
