"""How far context reuse of a masked generator is off, and what it saves: `python -m vistok.eval.context_reuse MODEL`.

Draws the same images with full evaluations at every step and with several schedules of cheap ones (`ContextReuse`).
At every cheap evaluation the same canvas is evaluated in full as well, so that the error of the logits is measured where
it arises. Writes `context-reuse.json`, `context-reuse.png` and `report.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.masked import MaskedSamplingParams, generate_masked, predict
from vistok.decoding.ordered import StepCallback
from vistok.decoding.sampling import LogitsProcessor
from vistok.decoding.streams import ImageStreams
from vistok.eval.generator_measures import balanced_labels
from vistok.eval.machine import describe_machine, threads_in_words
from vistok.eval.markdown import table
from vistok.eval.rate_distortion_report import DPI, check_plotting
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
from vistok.hub import load
from vistok.models.generators.base import MaskedGenerator
from vistok.pipelines.settings import MaskedSettings

BATCH_SIZE = 50


@dataclass(frozen=True)
class Point:
    """One schedule of full and cheap evaluations, beside full ones at every step."""

    num_steps: int
    period: int  # 1: every evaluation is full
    warm_up: int
    seconds: float  # per image
    speed_up: float  # over full evaluations, in the same run
    evaluated: float  # share of all positions that is computed, mean over the steps
    changed: float  # share of the tokens that differs from those of full evaluations with the same seed
    divergence: float | None  # mean KL divergence of cheap logits from full ones; None where all are full
    stale: float | None  # likewise of the full logits of the step before, at the same steps


@dataclass(frozen=True)
class Report:
    """All points with their protocol."""

    model: str
    num_parameters: int
    num_tokens: int
    points: list[Point]
    other_seed: dict[
        int, float
    ]  # number of steps -> share of the tokens that differs from those of another seed
    num_images: int
    guidance_scale: float
    guidance_schedule: str
    choice_temperature: float
    timed_batch: int
    repeats: int
    num_threads: int
    machine: str
    vistok: str


class Images:
    """Draws the same images in any way.

    Args:
        model: a masked generator in evaluation mode.
        num_images: equally many of each class.
    """

    def __init__(self, model: Any, num_images: int) -> None:
        self.model = model
        self.labels = balanced_labels(num_images, model.num_classes)

    def draw(self, settings: MaskedSettings, first_seed: int = 0) -> Tensor:
        """Tokens `[num_images n]`; image i has the seed `first_seed + i`."""
        drawn = []
        for labels, start in self._batches():
            streams = ImageStreams.from_seeds(range(first_seed + start, first_seed + start + len(labels)))
            drawn.append(_generate(self.model, labels, streams, settings))
        return torch.cat(drawn)

    def watch(self, settings: MaskedSettings) -> tuple[Tensor, Errors]:
        """What `draw` gives, and how far its evaluations are off."""
        drawn, errors = [], Errors()
        for labels, start in self._batches():
            watch = Watch(self.model, labels, settings, errors)
            streams = ImageStreams.from_seeds(range(start, start + len(labels)))
            drawn.append(_generate(self.model, labels, streams, settings, watch.compare, watch.on_step))
        return torch.cat(drawn), errors

    def _batches(self) -> list[tuple[Tensor, int]]:
        starts = range(0, len(self.labels), BATCH_SIZE)
        return list(zip(self.labels.split(BATCH_SIZE), starts, strict=True))


class Mean:
    """A mean that grows."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Counts all of them."""
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float | None:
        """`None` of nothing."""
        return self.total / self.count if self.count else None


class Errors:
    """Means over all steps and images, see `Point`."""

    def __init__(self) -> None:
        self.divergence, self.stale, self.evaluated = Mean(), Mean(), Mean()


class Watch:
    """Looks on while a batch is drawn, and compares cheap logits with full ones of the same canvas.

    Args:
        model, labels, settings: what is drawn.
        errors: what is found is added there.
    """

    def __init__(self, model: Any, labels: Tensor, settings: MaskedSettings, errors: Errors) -> None:
        self.model = model
        self.labels = labels.to(model.device)
        self.settings = settings
        self.errors = errors
        self.canvas = torch.full((len(labels), model.num_tokens), model.mask_token_id, device=model.device)
        self.step = 0
        self.share = 1.0  # of class and positions, that a cheap evaluation computes
        self.before: Tensor | None = None  # full logits of the last step

    def compare(self, logits: Tensor) -> Tensor:
        """A `LogitsProcessor` that changes nothing."""
        is_masked = self.canvas == self.model.mask_token_id
        is_full = self.settings.reuse.is_full(self.step)
        exact = logits if is_full else self._exact()
        if is_full:
            self.share = (1 + float(is_masked.sum()) / len(logits)) / (1 + self.model.num_tokens)
        elif self.before is not None:
            self.errors.divergence.add(divergence(exact[is_masked], logits[is_masked]))
            self.errors.stale.add(divergence(exact[is_masked], self.before[is_masked]))
        self.errors.evaluated.add(torch.tensor(1.0 if is_full else self.share).expand(len(logits)))
        self.before = exact
        return logits

    def on_step(self, step: int, canvas: Tensor) -> None:
        """A `StepCallback`."""
        self.step, self.canvas = step + 1, canvas

    def _exact(self) -> Tensor:
        scale = self.settings.guidance.at(self.step, self.settings.num_inference_steps)
        null = torch.full_like(self.labels, self.model.null_label)
        return predict(self.model, self.canvas, self.labels, null, scale)


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL divergence, in nats, of the distributions of `other [m v]` from those of `exact [m v]`, both logits: `[m]`."""
    exact, other = exact.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return (exact.exp() * (exact - other)).sum(dim=-1)


def _generate(
    model: MaskedGenerator,
    labels: Tensor,
    streams: ImageStreams,
    settings: MaskedSettings,
    logits_processor: LogitsProcessor | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    return generate_masked(
        model,
        labels,
        streams=streams,
        sampling=settings.sampling,
        guidance=settings.guidance,
        reuse=settings.reuse,
        logits_processor=logits_processor,
        on_step=on_step,
    )


@torch.inference_mode()
def measure(
    model: Any,
    settings: MaskedSettings,
    schedules: Sequence[ContextReuse],
    *,
    num_images: int,
    timed_batch: int,
    repeats: int,
) -> list[Point]:
    """Full evaluations first, then all schedules, with one number of steps.

    Args:
        model: a masked generator in evaluation mode.
        settings: steps, guidance, noise.
        schedules: of full and cheap evaluations.
        num_images: whose tokens and logits are compared.
        timed_batch: images per timed call.
        repeats: timed calls of each schedule, in turns; the median counts.
    """
    ways = [
        replace(settings, reuse_period=reuse.period, reuse_warm_up=reuse.warm_up)
        for reuse in (ContextReuse(period=1), *schedules)
    ]
    seconds = _time(Images(model, timed_batch), ways, repeats)
    images = Images(model, num_images)
    full = images.draw(ways[0])
    points = []
    for way, spent in zip(ways, seconds, strict=True):
        tokens, errors = images.watch(way)
        point = Point(
            num_steps=way.num_inference_steps,
            period=way.reuse_period,
            warm_up=way.reuse_warm_up,
            seconds=spent / timed_batch,
            speed_up=seconds[0] / spent,
            evaluated=errors.evaluated.value or 0.0,
            changed=changed_share(full, tokens),
            divergence=errors.divergence.value,
            stale=errors.stale.value,
        )
        points.append(point)
        sys.stderr.write(f"{point}\n")
    return points


def _time(images: Images, ways: Sequence[MaskedSettings], repeats: int) -> list[float]:
    calls: list[Callable[[], Tensor]] = [partial(images.draw, way) for way in ways]
    for call in calls:
        call()
    return median_seconds(calls, repeats, images.model.device)


def changed_share(tokens: Tensor, others: Tensor) -> float:
    """The share of entries that differ."""
    return float((tokens != others).double().mean())


def write_report(report: Report, folder: Path) -> None:
    """Write `context-reuse.json`, `context-reuse.png` and `report.md` into an existing folder."""
    with atomic_path(folder / "context-reuse.json") as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "context-reuse.png") as file:
        _draw(report, file)
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report), encoding="utf-8")


def _draw(report: Report, path: Path) -> None:
    """A panel per number of steps: one line per warm-up, along the periods."""
    from matplotlib.figure import Figure

    steps = list(report.other_seed)
    figure = Figure(figsize=(5.2 * len(steps), 4.2), layout="constrained")
    for panel, num_steps in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        points = [point for point in report.points if point.num_steps == num_steps]
        for warm_up in sorted({point.warm_up for point in points if point.period > 1}):
            line = [point for point in points if point.period > 1 and point.warm_up == warm_up]
            seconds, errors = [point.seconds for point in line], [point.divergence or 0.0 for point in line]
            panel.plot(seconds, errors, "o-", label=f"first {warm_up} full", markersize=3.5)
            for point, place in zip(line, zip(seconds, errors, strict=True), strict=True):
                panel.annotate(
                    str(point.period), place, textcoords="offset points", xytext=(4, 4), fontsize=8
                )
        panel.axvline(points[0].seconds, color="0.5", linestyle=":", label="all full")
        panel.set_title(f"{num_steps} steps")
        panel.set_xlabel(f"seconds per image, batch {report.timed_batch}")
        panel.set_ylabel("KL divergence of cheap logits, nats")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8, title="figures: period", title_fontsize=8)
    figure.savefig(path, dpi=DPI, format="png")


def _page(report: Report) -> str:
    header = ["Steps", "Period", "First full", "Seconds per image", "Speed-up", "Positions evaluated"]
    header += ["Tokens changed", "KL of cheap logits", "KL of the step before"]
    threads = threads_in_words(report.num_threads)
    others = ", ".join(f"{_percent(share)} ({num} steps)" for num, share in report.other_seed.items())
    lines = [
        f"# Context reuse: {report.model}",
        "",
        "![Seconds per image against the error of the logits](context-reuse.png)",
        "",
        *table(header, map(_cells, report.points), num_labels=3),
        "",
        f"- {report.num_parameters / 1e6:.1f} M parameters, {report.num_tokens} tokens per image; {report.num_images} "
        f"images, equally many of each class. Guidance {report.guidance_scale:g} ({report.guidance_schedule}), choice "
        f"temperature {report.choice_temperature:g}.",
        "- Period: one evaluation in so many is full, and so are the first ones. Positions evaluated: mean over the steps; "
        "a cheap evaluation computes what was undecided at the last full one.",
        "- Tokens changed: against full evaluations with the same seeds. Once a token differs, what follows is drawn for "
        f"another image; with other seeds it is {others}.",
        "- KL: of guided logits from those of a full evaluation of the same canvas, in nats, mean over the undecided "
        "positions of all cheap evaluations. The step before: of its full logits at the same places, which is the error "
        "of evaluating nothing.",
        f"- Seconds: to the tokens of a batch of {report.timed_batch}, median of {report.repeats} in turns, float32, "
        f"{threads}; {report.machine}; vistok {report.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(point: Point) -> list[str]:
    errors = ("" if error is None else f"{error:.2g}" for error in (point.divergence, point.stale))
    shares = (_percent(share) for share in (point.evaluated, point.changed))
    period = "all full" if point.period == 1 else str(point.period)
    warm_up = "" if point.period == 1 else str(point.warm_up)
    times = (f"{point.seconds:.4f}", f"{point.speed_up:.2f}")
    return [str(point.num_steps), period, warm_up, *times, *shares, *errors]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    options = _parser().parse_args(arguments)
    check_plotting()
    options.out.mkdir(parents=True, exist_ok=True)
    model = load_masked(options.model)
    schedules = [ContextReuse(period, warm_up) for warm_up in options.warm_ups for period in options.periods]
    images = Images(model, options.num_images)
    points, other_seed = [], {}
    for num_steps in options.num_steps:
        settings = MaskedSettings(
            num_inference_steps=num_steps,
            choice_temperature=options.choice_temperature,
            guidance_scale=options.guidance_scale,
            guidance_schedule=options.guidance_schedule,
        )
        points += measure(
            model,
            settings,
            schedules,
            num_images=options.num_images,
            timed_batch=options.timed_batch,
            repeats=options.repeats,
        )
        other_seed[num_steps] = changed_share(
            images.draw(settings), images.draw(settings, options.num_images)
        )
    report = Report(
        model=type(model).__name__,
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        num_tokens=model.num_tokens,
        points=points,
        other_seed=other_seed,
        num_images=options.num_images,
        guidance_scale=options.guidance_scale,
        guidance_schedule=options.guidance_schedule,
        choice_temperature=options.choice_temperature,
        timed_batch=options.timed_batch,
        repeats=options.repeats,
        num_threads=torch.get_num_threads(),
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


def load_masked(folder: str) -> Any:
    """A trained masked generator, or that of a pipeline.

    Raises:
        ValueError: another kind of model.
    """
    model = load(folder)
    model = getattr(model, "transformer", model)
    if not isinstance(model, MaskedGenerator):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which is no masked generator of codes")
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.context_reuse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a trained masked generator, or of a pipeline")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--periods", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--warm-ups", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--choice-temperature", type=float, default=MaskedSamplingParams.choice_temperature)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--guidance-schedule", default="constant")
    parser.add_argument("--num-images", type=int, default=100, help="per schedule, to compare")
    parser.add_argument("--timed-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
