"""Generators compared with equal work: `python -m vistok.eval.generator_comparison cifar10-generators -o FOLDER`.

One recipe names the common data, sizes and budget, and what distinguishes each generator. All see the same number of
training images in the same batches. Every generator is trained in `FOLDER/NAME`, or continued where it stopped, and
measured; what is done is not done again. Writes `generators.json`, `report.md`, a plot and a picture per generator.
`--jobs N` works on N generators at once, each in a process of its own; times are measured at the end, one by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.data.cifar10 import CLASS_NAMES, load_cifar10
from vistok.eval.comparison_recipe import (
    Comparison,
    Contestant,
    EvaluationOptions,
    load_comparison,
    own_comparisons,
)
from vistok.eval.features import FeatureExtractor, load_extractor
from vistok.eval.fid import FeatureSet, FidResult, compare_features, extract_features
from vistok.eval.generator_comparison_report import Report, write_report
from vistok.eval.generator_measures import (
    Point,
    Row,
    Sampling,
    balanced_labels,
    decode,
    measure_quality,
    picture_sheet,
    seconds_per_image,
)
from vistok.eval.kept_features import kept_features
from vistok.eval.machine import describe_machine
from vistok.eval.rate_distortion_report import check_plotting
from vistok.files import atomic_path
from vistok.hub import load, load_tokenizer
from vistok.models.generators.mar import MAR
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.training.recipe import Recipe
from vistok.training.run import run

BATCH_SIZE = 64

logger = logging.getLogger(__name__)


class Reference:
    """The real images and their features, which are kept in `folder`."""

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.options = comparison.evaluation
        self.cifar10 = comparison.recipe.task["cifar10"]
        self.extractor: FeatureExtractor = load_extractor(self.options.extractor)
        self.folder = folder

    def real(self) -> FeatureSet:
        """The test images' features."""
        count = self.options.num_reference
        images = load_cifar10(self.cifar10, "test")[0][:count]
        name = f"the first {count} test images of CIFAR-10"
        return kept_features(images, self.extractor, name=name, folder=self.folder)

    def originals(self) -> FidResult:
        """Distance of `num_samples` training images."""
        return self._distance(self._chosen().split(BATCH_SIZE), "training images")

    def reconstructions(self, tokenizer: ImageTokenizer) -> FidResult:
        """Distance of the same images after `tokenizer`."""
        images = self._chosen().split(BATCH_SIZE)
        decoded = (decode(tokenizer, tokenizer.encode(few.float() / 127.5 - 1)) for few in images)
        return self._distance(decoded, f"training images reconstructed by {tokenizer.identity()}")

    def _distance(self, images: Iterable[Tensor], name: str) -> FidResult:
        made = extract_features(images, self.extractor, name=name)
        return compare_features(self.real(), made, extractor=self.extractor)

    def _chosen(self) -> Tensor:
        """The first training images of every class, as many as samples are drawn."""
        images, labels = load_cifar10(self.cifar10, "train")
        classes = len(CLASS_NAMES)
        wanted = balanced_labels(self.options.num_samples, classes).bincount(minlength=classes)
        rows = [(labels == label).nonzero()[:count, 0] for label, count in enumerate(wanted.tolist())]
        return images[torch.cat(rows)]


@dataclass
class Progress:
    """What is done of one generator; kept in its folder."""

    losses: dict[str, float]
    points: list[Point]

    def get(self, sampling: Sampling, guidance_scale: float) -> Point | None:
        """What was measured with this way of sampling."""
        wanted = sampling, guidance_scale
        return next((one for one in self.points if (one.sampling, one.guidance_scale) == wanted), None)


def work_on(contestant: Contestant, comparison: Comparison, folder: Path) -> None:
    """Train a generator in `folder/name` and measure its quality there, as far as that is not done."""
    own, options = folder / contestant.name, comparison.evaluation
    tokenizer = load_tokenizer(contestant.recipe.task["tokenizer"])
    key = _key(contestant, options, tokenizer)
    done = _read(own, key) or Progress(run(contestant.recipe, own), [])
    _write(own, key, done)
    missing = [
        (sampling, scale)
        for sampling in contestant.samplings
        for scale in options.guidance_scales
        if done.get(sampling, scale) is None
    ]
    if not missing:
        return
    reference = Reference(comparison, folder)
    model, real = load(own / "model"), reference.real()
    for sampling, scale in missing:
        point = measure_quality(
            model,
            tokenizer,
            real,
            extractor=reference.extractor,
            sampling=sampling,
            guidance_scale=scale,
            num_samples=options.num_samples,
        )
        done.points.append(point)
        _write(own, key, done)


def _key(contestant: Contestant, options: EvaluationOptions, tokenizer: ImageTokenizer) -> Any:
    """What the measurements of a generator depend on, besides the sampling, as plain data."""
    quality = [options.num_samples, options.num_reference, options.extractor, tokenizer.identity()]
    return json.loads(json.dumps([contestant.recipe.to_dict(), quality]))


def _read(own: Path, key: Any) -> Progress | None:
    """What was written for the same `key`, or nothing."""
    path = own / "measured.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("of") != key:
        return None
    points = [Point(**{**point, "sampling": Sampling(**point["sampling"])}) for point in found["points"]]
    return Progress(found["losses"], points)


def _write(own: Path, key: Any, done: Progress) -> None:
    with atomic_path(own / "measured.json") as partial:
        partial.write_text(json.dumps({"of": key, **asdict(done)}, indent=2) + "\n")


def make_rows(contestant: Contestant, comparison: Comparison, folder: Path) -> list[Row]:
    """The results of a generator that was worked on; measures the times."""
    own, options = folder / contestant.name, comparison.evaluation
    tokenizer = load_tokenizer(contestant.recipe.task["tokenizer"])
    done = _read(own, _key(contestant, options, tokenizer))
    assert done is not None
    model = load(own / "model")
    rows = []
    for sampling in contestant.samplings:
        seconds = {
            batch_size: seconds_per_image(
                model,
                tokenizer,
                sampling=sampling,
                guidance_scale=options.timed_guidance,
                batch_size=batch_size,
                repeats=options.repeats,
            )
            for batch_size in options.timed_batches
        }
        row = Row(
            name=contestant.name,
            model_class=type(model).__name__,
            tokenizer=tokenizer.identity(),
            sampling=str(sampling),
            order=_order_name(model, contestant.recipe),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            num_steps=sampling.steps(model),
            num_denoising_steps=sampling.denoising_steps(model),
            losses=done.losses,
            points=[point for scale in options.guidance_scales if (point := done.get(sampling, scale))],
            seconds=seconds,
        )
        logger.info("%s", row)
        rows.append(row)
    return rows


def _order_name(model: Any, recipe: Recipe) -> str:
    if recipe.task.get("random_orders") or isinstance(model, MAR):
        return "random, another for every image in training"
    if not hasattr(model, "order"):
        return "the surest first"
    return recipe.model.get("order") or type(model.order).__name__.removesuffix("Order").lower()


def compare(comparison: Comparison, folder: Path) -> Report:
    """Measure the times and gather everything; all generators must have been worked on."""
    reference = Reference(comparison, folder)
    rows = [row for contestant in comparison.contestants for row in make_rows(contestant, comparison, folder)]
    names = dict.fromkeys(contestant.recipe.task["tokenizer"] for contestant in comparison.contestants)
    tokenizers = [load_tokenizer(name) for name in names]
    optimization = comparison.recipe.optimization
    return Report(
        rows=rows,
        reconstructions={one.identity(): reference.reconstructions(one) for one in tokenizers},
        originals=reference.originals(),
        evaluation=comparison.evaluation,
        recipe=comparison.recipe.to_dict(),
        num_training_images=optimization.num_steps * optimization.batch_size,
        num_threads=torch.get_num_threads(),
        dtype="float32",
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )


def draw_pictures(comparison: Comparison, rows: Sequence[Row], folder: Path) -> dict[str, Tensor]:
    """Title of a row -> its `picture_sheet` at its best guidance scale."""
    drawn = [(one, sampling) for one in comparison.contestants for sampling in one.samplings]
    return {
        row.title: picture_sheet(
            load(folder / row.name / "model"),
            load_tokenizer(contestant.recipe.task["tokenizer"]),
            sampling=sampling,
            guidance_scale=row.best.guidance_scale,
            seeds_per_class=comparison.evaluation.seeds_per_class,
        )
        for row, (contestant, sampling) in zip(rows, drawn, strict=True)
    }


def work_in_processes(arguments: Sequence[str], names: Sequence[str], jobs: int) -> None:
    """Call this command once per generator, `jobs` at a time; raises RuntimeError if one of them fails."""

    def work(name: str) -> int:
        command = [sys.executable, "-m", "vistok.eval.generator_comparison", *arguments, "--only", name]
        return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        failed = [name for name, status in zip(names, pool.map(work, names), strict=True) if status]
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed, see above; repeat the command to continue")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    check_plotting()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = own_comparisons().get(options.recipe, Path(options.recipe))
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    comparison = load_comparison(
        path, folder, budget_steps=options.budget_steps, num_samples=options.num_samples
    )
    contestants = comparison.chosen(options.only)
    if options.only is None and options.jobs > 1:
        Reference(comparison, folder).real()  # once, before all of them want it
        names = [contestant.name for contestant in contestants]
        work_in_processes(arguments, names, options.jobs)
    for contestant in contestants:
        work_on(contestant, comparison, folder)
    if options.only is None:
        report = compare(comparison, folder)
        write_report(report, draw_pictures(comparison, report.rows, folder), folder)
        sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.generator_comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help=f"a YAML file, or one of {', '.join(own_comparisons())}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--jobs", type=int, default=1, help="generators to work on at once")
    parser.add_argument("--only", metavar="NAME", help="train and measure this generator, and report nothing")
    parser.add_argument("--budget-steps", type=int, help="train so many steps instead of the recipe's")
    parser.add_argument("--num-samples", type=int, help="draw so many images, and compare with no more")
    return parser


if __name__ == "__main__":
    main()
