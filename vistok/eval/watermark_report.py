"""A measurement of the watermark as files: JSON, a table and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vistok.eval.markdown import table
from vistok.eval.watermark import StrengthPoint, WatermarkReport
from vistok.files import atomic_path

DPI = 110


def write_report(result: WatermarkReport, folder: Path) -> None:
    """Write `watermark.json`, `watermark.png` and `report.md` into an existing folder."""
    with atomic_path(folder / "watermark.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "watermark.png") as file:
        _draw(result, file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(result), encoding="utf-8")


def _draw(result: WatermarkReport, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    found, cost = figure.subplots(1, 2)
    strengths = [point.strength for point in result.points]
    for name in result.points[0].detected:
        shares = [100 * point.detected[name] for point in result.points]
        found.plot(strengths, shares, "o-", label=name, markersize=3.5)
    found.axhline(100 * result.false_positive_rate, color="0.5", linestyle=":", label="false positives")
    found.set_ylabel(f"found at {100 * result.false_positive_rate:g} % false positives, %")
    changed = [100 * point.changed_tokens for point in result.points]
    recognised = [100 * (point.recognised.share or 0) for point in result.points]
    cost.plot(strengths, changed, "s--", color="tab:orange", label="tokens changed", markersize=3.5)
    cost.plot(strengths, recognised, "o-", color="tab:blue", label="images recognised", markersize=3.5)
    cost.set_ylabel("%")
    for axes in (found, cost):
        axes.set_xlabel("strength, added to the logits of green codes")
        axes.set_ylim(-2, 102)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI, format="png")


def _page(result: WatermarkReport) -> str:
    sources = list(result.points[0].detected)
    rate = f"{100 * result.false_positive_rate:g} %"
    header = ["Strength", *(f"Found, {name}" for name in sources), "Mean z, tokens", "Tokens changed"]
    kept = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in result.kept_tokens.items())
    sampling = ", ".join(f"{name} {value}" for name, value in result.sampling.items())
    null_rows = (
        [f.images, str(f.num_images), *(_percent(share) for share in (f.mean, f.lowest, f.highest))]
        for f in result.false_positives
    )
    lines = [
        f"# Watermark of {result.model}",
        "",
        "![Share of images found, and what the watermark costs, against its strength](watermark.png)",
        "",
        *table([*header, "PSNR, dB", "Recognised"], (_cells(point, sources) for point in result.points)),
        "",
        "## Unmarked images called marked",
        "",
        *table(["Images", "Number", "Mean over keys", "Lowest", "Highest"], null_rows),
        "",
        f"- Found: p-value at most {result.false_positive_rate:g}, exact over keys and corrected for "
        f"{result.num_lists} lists of {100 * result.green_fraction:g} % of the codes (`vistok/decoding/watermark.py`).",
        f"- Images: {result.num_images} names, one image each of {result.num_tokens} tokens; every "
        f"{result.batch_size} images have a key of their own. {sampling}.",
        "- Tokens: as they were drawn. PNG, JPEG: the picture saved so, read and encoded again; without a watermark "
        f"this keeps {kept} of the tokens.",
        "- Tokens changed, PSNR: against the image of the same seed without watermark; PSNR of the mean squared error "
        "over all images. Once a token differs, what follows is drawn for another image.",
        "- Recognised: the nearest of the real images of these names has the subcategory of the one that was asked for "
        "(cosine of EfficientNet-Lite0 features).",
        f"- Unmarked images: tested with {result.num_null_keys} keys each. The promise of {rate} is for the mean over "
        "keys; images of one model share codes, so that with one key more of them may be called marked, or none.",
        f"- Machine: {result.machine}; vistok {result.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(point: StrengthPoint, sources: list[str]) -> list[str]:
    return [
        f"{point.strength:g}",
        *(_percent(point.detected[name]) for name in sources),
        f"{point.z_score['tokens']:.2f}",
        _percent(point.changed_tokens),
        "same" if point.psnr is None else f"{point.psnr:.1f}",
        str(point.recognised),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
