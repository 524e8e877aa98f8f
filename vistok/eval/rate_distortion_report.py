"""A rate-distortion measurement as files: JSON and CSV for programs, a table and a plot for people."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vistok.eval.markdown import table
from vistok.eval.rate_distortion import Point, RateDistortion

PANEL_SIZE = (5.2, 4.2)  # inches
DPI = 130
MEASURE_LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}


def check_plotting() -> None:
    """Raises ModuleNotFoundError if the plot could not be drawn; to be called before the work begins."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the plot needs matplotlib; run `pip install 'vistok[eval]'`") from None


def write_report(result: RateDistortion, folder: Path) -> list[Path]:
    """Write `rate-distortion.json`, `.csv` and `.png`, and `report.md`, into an existing folder; returns their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    json_file, csv_file, picture, page = (
        folder / name
        for name in ("rate-distortion.json", "rate-distortion.csv", "rate-distortion.png", "report.md")
    )
    json_file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    rows = [_row(point) for point in result.points]
    with csv_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _draw(result, picture)
    page.write_text(_page(result, picture.name), encoding="utf-8")
    return [json_file, csv_file, picture, page]


def _row(point: Point) -> dict[str, Any]:
    row = asdict(point)
    return {**row, **row.pop("distances")}


def _draw(result: RateDistortion, path: Path) -> None:
    """One panel per measure. Without pyplot, so that no display is needed and no global state is touched."""
    check_plotting()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    measures = ["psnr", "ssim", *result.distances]
    figure = Figure(figsize=(PANEL_SIZE[0] * len(measures), PANEL_SIZE[1]), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for panel, measure in zip(panels, measures, strict=True):
        for number, method in enumerate(result.methods):
            points = [point for point in result.points if point.method == method]
            _draw_curve(panel, points, measure, colour=f"C{number}")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(axis="x", labelsize=8, labelrotation=30)
        panel.set_xlabel("bytes per pixel")
        panel.set_ylabel(MEASURE_LABELS.get(measure, f"{measure} distance (lower is better)"))
        panel.grid(True, which="both", alpha=0.25)
    panels[0].legend(frameon=False)
    height, width = result.image_size
    figure.suptitle(f"{result.num_images} images of {width}x{height} pixels: {result.source}")
    figure.savefig(path, dpi=DPI)


def _draw_curve(panel: Any, points: list[Point], measure: str, colour: str) -> None:
    """The files' rate as a solid line; the payload's, where there is one, dashed."""
    rows = [row for row in map(_row, points) if row[measure] is not None]  # an exact image has no finite PSNR
    name, values = points[0].method, [row[measure] for row in rows]
    has_payload = points[0].payload_bytes is not None
    styles = {"file_bytes_per_pixel": ("-o", f"{name}, file" if has_payload else name)}
    if has_payload:
        styles["payload_bytes_per_pixel"] = ("--o", f"{name}, payload")
    for rate, (style, label) in styles.items():
        rates = [row[rate] for row in rows]
        panel.plot(rates, values, style, color=colour, label=label, markersize=3.5, linewidth=1.4)


def _page(result: RateDistortion, picture: str) -> str:
    """The table and the protocol in markdown."""
    height, width = result.image_size
    header = ["Method", "Setting", "File, bytes", "Bytes per pixel", "Payload, bytes", "PSNR, dB", "SSIM"]
    lines = [
        f"# Rate and distortion: {result.source}",
        "",
        f"![Bytes per pixel against quality]({picture})",
        "",
        *table(
            [*header, *result.distances],
            (_cells(point, list(result.distances)) for point in result.points),
            num_labels=2,
        ),
        "",
        f"- Images: {result.num_images} of {width}x{height} pixels from {result.source}; means over images, "
        f"rounded to {result.rounding}.",
        "- File: all bytes on disk, headers included. Payload: ceil(tokens * log2(codebook size) / 8).",
        *(f"- {name}: {description}." for name, description in result.methods.items()),
        *(
            f"- Distance {name}: {description}; lower is better."
            for name, description in result.distances.items()
        ),
        *(f"- Not measured, {name}: {reason}" for name, reason in result.unavailable.items()),
        f"- Machine: {result.machine}; vistok {result.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(point: Point, distances: list[str]) -> list[str]:
    return [
        point.method,
        f"{point.setting} {point.value}",
        f"{point.file_bytes:.0f}",
        f"{point.file_bytes_per_pixel:.4f}",
        "" if point.payload_bytes is None else f"{point.payload_bytes:.0f}",
        "exact" if point.psnr is None else f"{point.psnr:.2f}",
        f"{point.ssim:.4f}",
        *(f"{point.distances[name]:.4f}" for name in distances),
    ]
