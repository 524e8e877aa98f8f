"""Time of class-conditional generators at full size on the CPU: `python -m vistok.eval.generator_speed -o FOLDER`.

Weights are random: time does not depend on them. Whole images are drawn with guidance and timed beside the least time in
which the machine, at the memory bandwidth measured in the same run, could read the weights that often. Single steps are
timed beside the plain way, the whole sequence again without a cache. Before that, the cached logits of all steps must be
those of one pass over the whole sequence. Writes `generator-speed.json` and `report.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.eval.machine import describe_machine
from vistok.eval.markdown import table
from vistok.eval.peak_memory import MIB
from vistok.eval.random_weights import randomize
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
from vistok.models.generators import llamagen, nar
from vistok.models.generators.base import OrderedGenerator
from vistok.models.generators.llamagen import GridTransformer, LlamaGenClass
from vistok.models.generators.nar import NARClass

FAMILIES: dict[str, Callable[[], GridTransformer]] = {  # class-conditional, 256 px: 16x16 tokens
    "llamagen-b": lambda: LlamaGenClass(**llamagen.PRESETS["B"]),
    "nar-b": lambda: NARClass(**nar.PRESETS["B"]),
}
GUIDANCE_SCALE = 2.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the largest logit. A step's sums are taken in another order than those of the whole sequence.
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2}
BANDWIDTH_BYTES = 2**30  # far beyond every cache
BANDWIDTH_REPEATS = 5


@dataclass(frozen=True)
class StepTime:
    """One forward in the midst of an image: with a cache, and over the whole sequence again."""

    num_decided: int  # tokens decided before it, those it is fed included
    seconds: float
    plain_seconds: float


@dataclass(frozen=True)
class Measurement:
    """A batch of images of one family."""

    family: str
    dtype: str
    batch_size: int
    seconds_per_image: float  # median batch / batch_size
    num_forwards: int  # of both branches of guidance as one batch
    weights_mib: float  # that every forward reads: all but the tables of which it looks up some rows
    weights_share: float  # of the time: what reading the weights alone would need at the machine's bandwidth
    steps: list[StepTime]
    difference: float  # of cached logits from those of the whole sequence, as a share of the largest logit


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that this machine's memory moves, with the threads of the measurement."""

    read: float  # the sum of a large tensor
    copy: float  # a large tensor copied; bytes read and bytes written both count

    @property
    def best(self) -> float:
        """The larger of both, which gives the least time."""
        return max(self.read, self.copy)


@dataclass(frozen=True)
class SpeedReport:
    """All measurements with their protocol."""

    measurements: list[Measurement]
    parameters: dict[str, int]  # family -> number
    bandwidth: Bandwidth
    repeats: int
    num_threads: int
    guidance_scale: float
    machine: str


def build_generator(family: str) -> GridTransformer:
    """A family at full size with random weights, in evaluation mode.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    torch.manual_seed(0)
    return randomize(FAMILIES[family]()).eval()


def measure_bandwidth(num_bytes: int = BANDWIDTH_BYTES, repeats: int = BANDWIDTH_REPEATS) -> Bandwidth:
    """Read and copy a float32 tensor of `num_bytes`; the median of `repeats` after one that does not count."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    calls = (source.sum, lambda: target.copy_(source))
    median_seconds(calls, 1)
    read, copy = median_seconds(calls, repeats)
    return Bandwidth(read=num_bytes / read, copy=2 * num_bytes / copy)


@torch.inference_mode()
def measure(
    family: str, model: GridTransformer, bandwidth: Bandwidth, *, batch_size: int, repeats: int
) -> Measurement:
    """Time whole images and single steps, after a check that the cached steps compute what one pass does.

    Args:
        family: what the measurement is called.
        model: a class-conditional generator on the CPU, in evaluation mode.
        bandwidth: of this machine.
        batch_size: images.
        repeats: timed runs of each; the median counts.

    Raises:
        ValueError: the logits differ; times of different functions mean nothing.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    difference = cache_difference(model)
    if not difference <= LARGEST_DIFFERENCE[dtype]:
        raise ValueError(
            f"{family}, {dtype}: logits with a cache and without differ by {difference:.3g} of the largest, more than "
            f"{LARGEST_DIFFERENCE[dtype]:.3g}; they do not compute the same, so their times are not compared"
        )
    labels = torch.arange(batch_size)

    def draw() -> Any:
        streams = ImageStreams.from_seeds(range(batch_size))
        return generate_ordered(model, labels, streams=streams, guidance=ConstantGuidance(GUIDANCE_SCALE))

    draw()
    (seconds,) = median_seconds([draw], repeats)
    read = weight_bytes(model)
    num_forwards = model.order.num_steps
    return Measurement(
        family=family,
        dtype=dtype,
        batch_size=batch_size,
        seconds_per_image=seconds / batch_size,
        num_forwards=num_forwards,
        weights_mib=read / MIB,
        weights_share=read * num_forwards / bandwidth.best / seconds,
        steps=[_time_step(model, step, 2 * batch_size, repeats) for step in _some_steps(model)],
        difference=difference,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that every forward reads: all but those of embeddings, of which it looks up some rows."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(w.numel() * w.element_size() for w in model.parameters() if id(w) not in tables)


@torch.inference_mode()
def cache_difference(model: OrderedGenerator) -> float:
    """Largest difference of step-by-step logits from those of one pass over all tokens, over the largest logit."""
    label = torch.zeros(1, dtype=torch.int64)
    indices = _random_indices(model, 1)
    cache, plan = model.new_cache(1), model.order.plan()
    steps = [model.prefill(label, cache)]
    steps += [model.step(indices[:, positions], cache) for positions in plan[:-1]]
    whole: Tensor = model(label, indices)[:, model.order.sequence()]  # [1 n v]
    return ((torch.cat(steps, dim=1) - whole).abs().max() / whole.abs().max()).item()


def _random_indices(model: OrderedGenerator, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.codebook_size, (batch_size, model.num_tokens), generator=generator)


def _some_steps(model: OrderedGenerator) -> list[int]:
    """The first step that is fed tokens, the middle one, and the last."""
    last = model.order.num_steps - 1
    return sorted({1, (last + 1) // 2, last})


def _time_step(model: GridTransformer, step: int, num_rows: int, repeats: int) -> StepTime:
    """Time the forward that gives the logits of `step`, for `num_rows` rows."""
    plan = model.order.plan()
    labels, indices = torch.zeros(num_rows, dtype=torch.int64), _random_indices(model, num_rows)
    cache = model.new_cache(num_rows)
    model.prefill(labels, cache)
    for positions in plan[: step - 1]:
        model.step(indices[:, positions], cache)
    length = cache.length

    def cached() -> Tensor:
        cache.rollback(length)
        return model.step(indices[:, plan[step - 1]], cache)

    def plain() -> Tensor:
        return plain_step(model, labels, indices, step)

    _ = cached(), plain()
    seconds, plain_seconds = median_seconds([cached, plain], repeats)
    return StepTime(sum(map(len, plan[:step])), seconds, plain_seconds)


def plain_step(model: GridTransformer, class_labels: Tensor, indices: Tensor, step: int) -> Tensor:
    """The logits of `step`, at least 1, from the classes and all tokens decided before it, without a cache.

    Args:
        model: a class-conditional generator.
        class_labels: `[b]` int64.
        indices: `[b n]` int64, of which those decided before `step` are read.
        step: what is predicted.

    Returns:
        `[b k codebook_size]`, by ascending position.
    """
    plan = model.order.plan()
    features = model.read_all(class_labels, indices[:, torch.cat(plan[:step])])
    before, after = (x[:, -len(plan[step - 1]) :] for x in features)  # at the tokens decided last
    if isinstance(model, NARClass):
        right, below = model.logits(before, after)
        return nar.merge_heads(right, below, step, model.options.grid_size)
    assert isinstance(model, LlamaGenClass)
    return model.logits(after)


def write_report(result: SpeedReport, folder: Path) -> None:
    """Write `generator-speed.json` and `report.md` into an existing folder."""
    with atomic_path(folder / "generator-speed.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(result), encoding="utf-8")


def _page(result: SpeedReport) -> str:
    labels = ["Family", "Type", "Batch"]
    images = [
        "Seconds per image",
        "Forwards",
        "Weights read, MiB",
        "Least time for the weights",
        "Difference",
    ]
    steps = ["Tokens before", "Milliseconds", "Without a cache", "Speed-up"]
    parameters = ", ".join(f"{family} {n / 1e6:.0f} M parameters" for family, n in result.parameters.items())
    lines = [
        "# Time of the generators on the CPU",
        "",
        *table(labels + images, map(_image_cells, result.measurements), num_labels=3),
        "",
        "## One forward",
        "",
        *table(labels + steps, (row for m in result.measurements for row in _step_cells(m)), num_labels=3),
        "",
        f"- Class-conditional, 256 tokens for 256 pixels, random weights: {parameters}. Tokens only: no tokenizer.",
        f"- Guidance {result.guidance_scale:g}: every forward computes both branches, two rows per image.",
        "- Weights read: all but the embedding tables, of which a forward looks up some rows. Least time: the share of "
        "the measured time in which the memory could deliver these bytes once per forward, and nothing else.",
        f"- Memory: read {result.bandwidth.read / 1e9:.1f} GB/s (sum of a tensor of {BANDWIDTH_BYTES / 2**30:g} GiB), "
        f"copy {result.bandwidth.copy / 1e9:.1f} GB/s (bytes read and written); the larger counts.",
        "- Without a cache: the same modules over the class and all tokens decided before, logits of the next ones only.",
        "- Difference: of cached logits from those of one pass over the whole sequence, largest over all steps, as a "
        "share of the largest logit; checked before anything is timed.",
        f"- Median of {result.repeats} runs after another one; {result.num_threads} threads; {result.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _image_cells(m: Measurement) -> list[str]:
    return [
        *_labels(m),
        f"{m.seconds_per_image:.2f}",
        str(m.num_forwards),
        f"{m.weights_mib:.0f}",
        f"{100 * m.weights_share:.0f} %",
        f"{m.difference:.1e}",
    ]


def _step_cells(m: Measurement) -> Iterator[list[str]]:
    for step in m.steps:
        times = [f"{1000 * seconds:.1f}" for seconds in (step.seconds, step.plain_seconds)]
        yield [*_labels(m), str(step.num_decided), *times, f"{step.plain_seconds / step.seconds:.1f}"]


def _labels(m: Measurement) -> list[str]:
    return [m.family, m.dtype, str(m.batch_size)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.generator_speed", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    bandwidth = measure_bandwidth()
    measurements, parameters = [], {}
    for family in options.families:
        for dtype in options.dtypes:
            model: Any = build_generator(family)
            model.to(DTYPES[dtype])
            parameters[family] = sum(weight.numel() for weight in model.parameters())
            for batch_size in options.batch_sizes:
                measurement = measure(
                    family, model, bandwidth, batch_size=batch_size, repeats=options.repeats
                )
                sys.stderr.write(f"{measurement}\n")
                measurements.append(measurement)
    result = SpeedReport(
        measurements,
        parameters,
        bandwidth,
        repeats=options.repeats,
        num_threads=torch.get_num_threads(),
        guidance_scale=GUIDANCE_SCALE,
        machine=str(describe_machine()),
    )
    write_report(result, options.out)
    sys.stdout.write(json.dumps(asdict(result), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
