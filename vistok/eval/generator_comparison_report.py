"""A comparison of generators as files: JSON for programs, a table, a plot and pictures for people."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vistok.data.cifar10 import CLASS_NAMES
from vistok.eval.comparison_recipe import EvaluationOptions
from vistok.eval.fid import FidResult
from vistok.eval.generator_measures import Row
from vistok.eval.machine import threads_in_words
from vistok.eval.markdown import table
from vistok.eval.rate_distortion_report import DPI, PANEL_SIZE, check_plotting
from vistok.files import atomic_path

MARKERS = "osD^v<>P"
ENLARGED = 2  # pixels of a picture per pixel of a sample
LOSSES = {"heldout_nll": "NLL per token, nats", "heldout_masked_loss": "Masked loss, nats"}
HEADER = [
    "Generator",
    "Model",
    "Tokenizer",
    "Order",
    "Parameters, M",
    "Steps per image",
    "Denoising steps",
    "Fréchet distance",
    "Guidance",
    *LOSSES.values(),
]


@dataclass(frozen=True)
class Report:
    """All rows with their protocol."""

    rows: list[Row]
    reconstructions: dict[
        str, FidResult
    ]  # tokenizer -> of training images, against the same reference: its floor
    originals: FidResult  # the training images themselves: what so few images allow
    evaluation: EvaluationOptions
    recipe: dict[str, Any]  # of the first generator; the others differ in model, tokenizer and random_orders
    num_training_images: int  # seen by each generator, with repetition
    num_threads: int
    dtype: str
    machine: str
    vistok: str


def write_report(report: Report, pictures: Mapping[str, Tensor], folder: Path) -> None:
    """Write `generators.json`, `generators.png`, `report.md` and `samples-*.png` into an existing folder.

    Args:
        report: what was measured.
        pictures: title of a row -> images uint8 `[classes * seeds 3 H W]`, one class after the other.
        folder: where to.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_plotting()
    with atomic_path(folder / "generators.json") as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "generators.png") as file:
        _draw(report, file)
    names = {}
    for title, images in pictures.items():
        names[title] = f"samples-{title.replace(', ', '-').replace(' ', '-')}.png"
        with atomic_path(folder / names[title]) as file:
            _sheet(images, report.evaluation.seeds_per_class).save(file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report, names), encoding="utf-8")


def _sheet(images: Tensor, columns: int) -> Image.Image:
    tiles = make_grid(images, nrow=columns, padding=1, pad_value=255)  # [3 H W] uint8
    picture = Image.fromarray(tiles.permute(1, 2, 0).numpy())
    return picture.resize((ENLARGED * picture.width, ENLARGED * picture.height), Image.Resampling.NEAREST)


def _draw(report: Report, path: Path) -> None:
    """A panel per batch size. Without pyplot, so that no display is needed and no global state is touched."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    batches = report.evaluation.timed_batches
    figure = Figure(figsize=(PANEL_SIZE[0] * len(batches), PANEL_SIZE[1]), layout="constrained")
    for panel, batch_size in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for number, row in enumerate(report.rows):
            place = row.seconds[batch_size], row.best.frechet_distance
            panel.plot(*place, MARKERS[number % len(MARKERS)], color=f"C{number % 10}", label=row.title)
        for tokenizer, floor in report.reconstructions.items():
            panel.axhline(floor.fid, color="grey", linestyle="--", linewidth=1)
            place = panel.get_yaxis_transform()
            text = f"reconstructions by {_family(tokenizer)}"
            panel.text(0.01, floor.fid, text, fontsize=7, va="bottom", transform=place)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.1, y=0.1)
        panel.set_xlabel(f"seconds per image, batch {batch_size}")
        panel.set_ylabel(f"Fréchet distance ({report.evaluation.extractor})")
        panel.grid(True, which="both", alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"CIFAR-10, {report.num_training_images:,} training images seen by each generator")
    figure.savefig(path, dpi=DPI)


def _page(report: Report, names: Mapping[str, str]) -> str:
    """Tables, pictures and protocol in markdown."""
    batches, scales = report.evaluation.timed_batches, report.evaluation.guidance_scales
    header = [*HEADER, *(f"Seconds per image, batch {size}" for size in batches)]
    lines = [
        "# Generators on CIFAR-10, compared with equal work",
        "",
        "![Seconds per image against Fréchet distance](generators.png)",
        "",
        *table(header, (_cells(row, batches) for row in report.rows), num_labels=4),
        "",
        "Fréchet distance at every guidance scale:",
        "",
        *table(
            ["Generator", *(f"{scale:g}" for scale in scales)],
            ([row.title, *(f"{point.frechet_distance:.1f}" for point in row.points)] for row in report.rows),
        ),
        "",
        *_protocol(report),
        "",
        f"Samples at the best scale; rows are {', '.join(CLASS_NAMES)}; columns are seeds, the same in all rows:",
        "",
    ]
    for title, name in names.items():
        lines += [f"**{title}**", "", f"![Samples of {title}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: Row, batches: Sequence[int]) -> list[str]:
    return [
        row.title,
        row.model_class,
        _family(row.tokenizer),
        row.order,
        f"{row.num_parameters / 1e6:.2f}",
        str(row.num_steps),
        "" if row.num_denoising_steps is None else str(row.num_denoising_steps),
        f"{row.best.frechet_distance:.1f}",
        f"{row.best.guidance_scale:g}",
        *(f"{row.losses[name]:.3f}" if name in row.losses else "" for name in LOSSES),
        *(f"{row.seconds[size]:.4f}" for size in batches),
    ]


def _protocol(report: Report) -> list[str]:
    """What the numbers mean, as a list."""
    options, floor, recipe = report.evaluation, report.originals, report.recipe
    training = recipe["optimization"]
    note = f" {floor.note}." if floor.note else ""
    return [
        f"- Training: {training['num_steps']} steps of {training['batch_size']} images for every generator "
        f"({report.num_training_images:,} images, of 50,000), learning rate {training['lr']:g}, classes dropped with "
        f"probability {recipe['task'].get('label_dropout', 0.1):g}, seed {recipe['seed']}; tokens of {' and '.join(report.reconstructions)}.",
        "- Equal work is counted in images. A training step of an AnyOrderAR takes longer than those of the others: it reads "
        "every position twice, as content and as query; MAR's evaluates its head four times. Steps per image: those of the "
        "order, at each of which a generator of continuous tokens takes its share of the denoising steps.",
        f"- Fréchet distance: {options.num_samples} images, equally many of each class, against {floor.real}; features "
        f"of {floor.extractor} ({floor.weights}), {floor.preprocessing}, {floor.rounding}. Not comparable with "
        f"Inception's.{note} The best of the scales below, the same for all; constant guidance, otherwise the model's own "
        "distribution (masked: Gumbel noise with the choice temperature).",
        f"- Of one generator the distance changes by up to {_unevenness(report.rows):.1f} from one scale to the next: smaller "
        "differences between generators say little. Masked generators are favoured: their choice temperature was chosen "
        "by this distance. Where the best scale is the largest, a still larger one may be better.",
        f"- For comparison: {options.num_samples} training images {floor.fid:.1f}, their reconstructions "
        + " and ".join(f"by {name} {one.fid:.1f}" for name, one in report.reconstructions.items())
        + ".",
        f"- NLL: of the tokens of {recipe['task'].get('heldout_images', 1000)} test images given their classes, by the "
        "chain rule in the generator's own order; tokens of one step count as independent. Masked loss: cross-entropy of "
        "the hidden tokens under fixed masks, which is no likelihood and not comparable with it.",
        f"- Seconds: from class to pixels, median of {options.repeats} batches after one that does not count, guidance "
        f"{options.timed_guidance:g} (two branches), {report.dtype}, "
        f"{threads_in_words(report.num_threads)}; {report.machine}; vistok {report.vistok}.",
    ]


def _family(tokenizer: str) -> str:
    """The class in the identity of a tokenizer."""
    return tokenizer.partition("-")[0]


def _unevenness(rows: Sequence[Row]) -> float:
    """The largest change of a generator's distance between neighbouring guidance scales."""
    distances = [[point.frechet_distance for point in row.points] for row in rows]
    return max((abs(b - a) for few in distances for a, b in itertools.pairwise(few)), default=0.0)
