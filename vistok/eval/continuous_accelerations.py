"""What the accelerations of continuous generators cost in quality: `python -m vistok.eval.continuous_accelerations`.

For a trained xAR and a trained MAR of one tokenizer: fewer denoising steps, DiSA's annealed ones, context reuse and
continuous speculation, each beside the full number of steps. The distance of an acceleration is the Fréchet distance of
its images from those of the full steps with other seeds; that of the full steps themselves, with these other seeds, says
how much of it is chance. Writes `accelerations.json`, `report.md` and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.decoding.speculative.continuous import SpeculationParams, generate_speculative
from vistok.decoding.streams import ImageStreams
from vistok.eval.features import FeatureExtractor, load_extractor
from vistok.eval.fid import FeatureSet, compare_features, extract_features
from vistok.eval.generator_measures import Sampling, balanced_labels, decode, draw_tokens
from vistok.eval.machine import describe_machine, threads_in_words
from vistok.eval.markdown import table
from vistok.eval.rate_distortion_report import DPI, check_plotting
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
from vistok.hub import load, load_tokenizer
from vistok.models.generators.mar import MAR
from vistok.models.identity import model_identity
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.settings import DiffusionSettings
from vistok.tokens import Tokens

EXTRACTOR = "efficientnet-lite0"
BATCH_SIZE = 50
MAR_STEPS = 16


@dataclass(frozen=True)
class Variant:
    """One way to sample; the first of a model is the full one.

    Args:
        name: what the table calls it.
        settings: of the model's pipeline, see `Sampling`.
        speculation: draft with a small model.
    """

    name: str
    settings: dict[str, Any]
    speculation: SpeculationParams | None = None


XAR_VARIANTS = (
    Variant("50 steps", {"num_inference_steps": 50}),
    Variant("25 steps", {"num_inference_steps": 25}),
    Variant("10 steps", {"num_inference_steps": 10}),
    Variant("DiSA, 50 to 15", {"num_inference_steps": 50, "num_final_inference_steps": 15}),
    Variant("DiSA, 50 to 5", {"num_inference_steps": 50, "num_final_inference_steps": 5}),
    Variant("DiSA, 16 to 5", {"num_inference_steps": 16, "num_final_inference_steps": 5}),
)
# From timestep 999 on, where MAR begins, errors of a network that was trained little are amplified beyond all measure.
MAR_FULL = {"num_steps": MAR_STEPS, "num_inference_steps": 50, "last_timestep": 950}
MAR_VARIANTS = (
    Variant("50 steps", MAR_FULL),
    Variant("25 steps", {**MAR_FULL, "num_inference_steps": 25}),
    Variant("10 steps", {**MAR_FULL, "num_inference_steps": 10}),
    Variant("DiSA, 50 to 5", {**MAR_FULL, "num_final_inference_steps": 5}),
    Variant("DiSA, 16 to 5", {**MAR_FULL, "num_inference_steps": 16, "num_final_inference_steps": 5}),
    Variant("reuse, period 2", {**MAR_FULL, "reuse_period": 2, "reuse_warm_up": 2}),
    Variant("reuse, period 4", {**MAR_FULL, "reuse_period": 4, "reuse_warm_up": 2}),
    Variant(
        "DiSA, 16 to 5, reuse, period 4",
        {
            **MAR_FULL,
            "num_inference_steps": 16,
            "num_final_inference_steps": 5,
            "reuse_period": 4,
            "reuse_warm_up": 2,
        },
    ),
    Variant("speculation, T 42", MAR_FULL, SpeculationParams(num_draft=4)),
    Variant("speculation, T 1", MAR_FULL, SpeculationParams(num_draft=4, inner_temperature=1.0)),
)


@dataclass(frozen=True)
class Sampler:
    """A model with what its images need.

    Args:
        name: of the model.
        model: the generator.
        tokenizer: of its tokens.
        draft: a small model for speculation.
        guidance_scale: constant, of all variants.
    """

    name: str
    model: Any
    tokenizer: ImageTokenizer
    draft: MAR | None
    guidance_scale: float

    def tokens(self, variant: Variant, labels: Tensor, seeds: Sequence[int]) -> Tokens:
        """Tokens of one image per label `[b]` and seed."""
        if variant.speculation is None:
            return draw_tokens(self.model, labels, seeds, Sampling(variant.settings), self.guidance_scale)
        assert self.draft is not None
        settings = Sampling(variant.settings).of(self.model, self.guidance_scale)
        assert isinstance(settings, DiffusionSettings) and settings.num_steps is not None
        return generate_speculative(
            self.draft,
            self.model,
            labels,
            streams=ImageStreams.from_seeds(seeds),
            num_steps=settings.num_steps,
            num_inference_steps=settings.num_inference_steps,
            head=settings.head,
            guidance=settings.guidance,
            speculation=variant.speculation,
        )

    def images(self, variant: Variant, num_images: int, first_seed: int) -> Iterator[Tensor]:
        """Batches uint8 `[b 3 H W]`, equally many of each class."""
        labels = balanced_labels(num_images, self.model.num_classes)
        for start in range(0, num_images, BATCH_SIZE):
            few = labels[start : start + BATCH_SIZE]
            seeds = range(first_seed + start, first_seed + start + len(few))
            yield decode(self.tokenizer, self.tokens(variant, few, seeds))


@dataclass(frozen=True)
class Row:
    """One variant of one model."""

    model: str
    variant: str
    settings: dict[str, Any]
    speculation: dict[str, Any] | None
    seconds: float  # per image
    speed_up: float  # over the full steps, in the same run
    from_full: float  # Fréchet distance from the images of the full steps
    from_real: float  # and from real images


@dataclass(frozen=True)
class Report:
    """All rows with their protocol."""

    rows: list[Row]
    models: dict[str, str]  # name -> identity, and what its order is
    num_images: int
    num_real: int
    guidance_scale: float
    timed_batch: int
    repeats: int
    extractor: str
    note: str  # of the distances
    tokenizer: str
    num_threads: int
    machine: str
    vistok: str


def measure(
    sampler: Sampler,
    variants: Sequence[Variant],
    real: FeatureSet,
    extractor: FeatureExtractor,
    *,
    num_images: int,
    timed_batch: int,
    repeats: int,
) -> list[Row]:
    """All variants of a model; the first is the full one.

    Args:
        sampler: the model.
        variants: ways to sample it.
        real: features of real images.
        extractor: of the distances.
        num_images: per variant.
        timed_batch: images per timed call.
        repeats: timed calls of each variant, in turns; the median counts.
    """
    labels = balanced_labels(timed_batch, sampler.model.num_classes)
    calls = [partial(sampler.tokens, variant, labels, range(timed_batch)) for variant in variants]
    for call in calls:
        call()
    seconds = [total / timed_batch for total in median_seconds(calls, repeats, sampler.model.device)]
    full = extract_features(sampler.images(variants[0], num_images, 0), extractor, name="full steps")
    rows = []
    for variant, spent in zip(variants, seconds, strict=True):
        made = extract_features(sampler.images(variant, num_images, num_images), extractor, name=variant.name)
        row = Row(
            model=sampler.name,
            variant=variant.name,
            settings=variant.settings,
            speculation=None if variant.speculation is None else asdict(variant.speculation),
            seconds=spent,
            speed_up=seconds[0] / spent,
            from_full=compare_features(full, made, extractor=extractor).fid,
            from_real=compare_features(real, made, extractor=extractor).fid,
        )
        rows.append(row)
    return rows


def write_report(report: Report, folder: Path) -> None:
    """Write `accelerations.json`, `accelerations.png` and `report.md` into an existing folder."""
    with atomic_path(folder / "accelerations.json") as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "accelerations.png") as file:
        _draw(report, file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report), encoding="utf-8")


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in report.rows))
    figure = Figure(figsize=(6.5 * len(models), 4.5), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rows = [row for row in report.rows if row.model == model]
        for number, row in enumerate(rows):
            panel.plot(row.seconds, row.from_full, "osD^v<>P*X"[number % 10], label=row.variant)
        panel.axhline(rows[0].from_full, color="0.5", linestyle=":", linewidth=1)
        panel.set_title(model)
        panel.set_xlabel(f"seconds per image, batch {report.timed_batch}")
        panel.set_ylabel("Fréchet distance from the images of the full steps")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=DPI, format="png")


def _page(report: Report) -> str:
    header = ["Model", "Sampling", "Seconds per image", "Speed-up", "From the full steps", "From real images"]
    threads = threads_in_words(report.num_threads)
    lines = [
        "# Accelerations of continuous generators",
        "",
        "![Seconds per image against the distance from the result of all steps](accelerations.png)",
        "",
        *table(header, map(_cells, report.rows), num_labels=2),
        "",
        f"- Fréchet distances of {report.num_images} images each, features of {report.extractor}, equally many of each "
        "class; between images of different seeds, so that of a model's first row is what chance alone gives. "
        f"Real images: the first {report.num_real} test images of CIFAR-10. {report.note}. Differences of a few units are "
        "chance.",
        f"- Models: {', '.join(f'{name} {what}' for name, what in report.models.items())}; tokenizer {report.tokenizer}. "
        f"Guidance {report.guidance_scale:g}, constant. The first row of a model is the "
        "full one; settings are in the JSON file.",
        f"- Seconds: to the tokens of a batch of {report.timed_batch}, median of {report.repeats} in turns, float32, "
        f"{threads}; {report.machine}; vistok {report.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    figures = (f"{row.seconds:.4f}", f"{row.speed_up:.2f}", f"{row.from_full:.1f}", f"{row.from_real:.1f}")
    return [row.model, row.variant, *figures]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    options = _parser().parse_args(arguments)
    check_plotting()
    options.out.mkdir(parents=True, exist_ok=True)
    extractor, tokenizer = load_extractor(EXTRACTOR), load_tokenizer(options.tokenizer)
    real = _real_features(options.cifar10, options.num_real, extractor)
    rows: list[Row] = []
    models: dict[str, str] = {}
    for name, folder, variants in (("xAR", options.xar, XAR_VARIANTS), ("MAR", options.mar, MAR_VARIANTS)):
        draft: Any = load(options.draft) if name == "MAR" else None
        sampler = Sampler(name, load(folder), tokenizer, draft, options.guidance_scale)
        models |= _identities(sampler)
        rows += measure(
            sampler,
            variants,
            real,
            extractor,
            num_images=options.num_images,
            timed_batch=options.timed_batch,
            repeats=options.repeats,
        )
    report = Report(
        rows=rows,
        models=models,
        num_images=options.num_images,
        num_real=len(real),
        guidance_scale=options.guidance_scale,
        timed_batch=options.timed_batch,
        repeats=options.repeats,
        extractor=EXTRACTOR,
        note=compare_features(real, real, extractor=extractor).note,
        tokenizer=tokenizer.identity(),
        num_threads=torch.get_num_threads(),
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


def _identities(sampler: Sampler) -> dict[str, str]:
    """What the report calls a model, and its draft."""
    order = getattr(sampler.model, "order", None)
    words = {
        sampler.name: f"{model_identity(sampler.model)}{'' if order is None else f', {order.num_steps} steps'}"
    }
    if sampler.draft is not None:
        words[f"draft of {sampler.name}"] = model_identity(sampler.draft)
    return words


def _real_features(cifar10: Path, count: int, extractor: FeatureExtractor) -> FeatureSet:
    from vistok.data.cifar10 import load_cifar10

    images = load_cifar10(cifar10, "test")[0][:count]
    return extract_features(images.split(BATCH_SIZE), extractor, name="test images of CIFAR-10")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.continuous_accelerations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--xar", required=True, help="folder of a trained XAR")
    parser.add_argument("--mar", required=True, help="folder of a trained MAR")
    parser.add_argument("--draft", required=True, help="folder of a smaller MAR, for speculation")
    parser.add_argument("--tokenizer", required=True, help="folder of their tokenizer")
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--num-images", type=int, default=500, help="per variant")
    parser.add_argument("--num-real", type=int, default=2000)
    parser.add_argument("--timed-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
