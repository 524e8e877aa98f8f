"""When speculative decoding pays where a step is bound by reading weights: `python -m vistok.eval.speculative_speed -o DIR`.

A generator at full size, batch 1. Times of its parts: a pass over 1 + n nodes beside a pass over one and a plain step, and
drafting n tokens. Then the same first tokens of an image with and without speculation, in turns, from which follow the
time per pass and how many tokens a pass must give to pay.

Weights are random. That does not change times, but it does change how much is accepted: the distributions of such a
generator are nearly uniform, and so are those of drafters with random weights, so that drafts are accepted far more often
than a trained model would accept them. The speed-ups that are measured show the mechanics; what a trained drafter gains
follows from the tokens per pass that it reaches. Writes `speculative-speed.json`, `report.md` and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.drafter import Drafter, DraftStart
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.tree import TreeShape
from vistok.decoding.streams import ImageStreams
from vistok.eval.machine import describe_machine
from vistok.eval.peak_memory import MIB
from vistok.eval.rate_distortion_report import check_plotting
from vistok.eval.speed_families import build_subject
from vistok.eval.speed_ways import FLOAT_TYPES
from vistok.eval.speed_work import weight_bytes
from vistok.eval.timing import median_seconds
from vistok.kernels.attention import TreeMask
from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.generators.base import NextTokenGenerator, Reading, join_conditions

SMALL_DEPTH = 2  # blocks of the small generator that drafts


@dataclass(frozen=True)
class PassTime:
    """A pass of the generator in the midst of an image."""

    num_nodes: int
    seconds: float
    relative: float  # to a pass over one node


@dataclass(frozen=True)
class Run:
    """Tokens drawn with a drafter of chains of n, beside the same drawn plainly."""

    drafter: str
    num_drafted: int  # n
    num_parameters: int  # of the drafter
    tokens_per_pass: float
    speed_up: float
    seconds_per_pass: float  # all in all: drafting, reading, accepting
    target_seconds: float  # of these: the generator's pass over 1 + n nodes, timed alone
    draft_seconds: float  # of these: drafting, timed alone
    plain_seconds: float  # per token, in turns with it

    def speed_up_at(self, tokens_per_pass: float) -> float:
        """What it would be at another number of tokens per pass, at the time per pass that was measured."""
        return tokens_per_pass * self.plain_seconds / self.seconds_per_pass

    def tokens_for(self, speed_up: float) -> float:
        """How many tokens per pass a speed-up takes; more than n + 1 cannot be reached."""
        return speed_up * self.seconds_per_pass / self.plain_seconds


@dataclass(frozen=True)
class Measurement:
    """A family in one precision."""

    family: str
    dtype: str
    num_parameters: int
    weights_mib: float  # that a pass reads
    step_seconds: float  # a plain step
    passes: list[PassTime]
    runs: list[Run]


@dataclass(frozen=True)
class SpeedReport:
    """All measurements with their protocol."""

    measurements: list[Measurement]
    num_tokens: int  # of an image that are drawn
    guidance_scale: float
    repeats: int
    num_threads: int
    device: str
    machine: str
    vistok: str


class Bench:
    """A class-conditional generator and one image.

    Args:
        model: with random weights, in evaluation mode.
        num_tokens: of the image, that are drawn.
        guidance_scale: 1.0 is off: one row instead of two.
        repeats: timed calls of each, in turns; the median counts.
    """

    def __init__(
        self, model: NextTokenGenerator, num_tokens: int, guidance_scale: float, repeats: int
    ) -> None:
        self.model = model
        self.num_tokens = num_tokens
        self.guidance = ConstantGuidance(guidance_scale)
        self.repeats = repeats
        self.label = torch.zeros(1, dtype=torch.int64)
        rows = self.label
        if guidance_scale != 1.0:
            rows = join_conditions(self.label, model.null_condition(1))  # type: ignore[assignment]
        self.rows = rows.to(model.device)

    def median(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of each call, after one that does not count."""
        for call in calls:
            call()
        return median_seconds(calls, self.repeats, self.model.device)

    def pass_times(self, node_counts: Sequence[int]) -> tuple[float, list[PassTime]]:
        """Seconds of a plain step, and of passes over chains of nodes; the first count is 1."""
        calls = [self._step(), *(self._pass(count) for count in node_counts)]
        step, *passes = self.median(calls)
        times = zip(node_counts, passes, strict=True)
        return step, [PassTime(count, seconds, seconds / passes[0]) for count, seconds in times]

    def _step(self) -> Callable[[], Tensor]:
        cache, indices = self._half()
        length = cache.length

        def step() -> Tensor:
            cache.rollback(length)
            return self.model.step(indices[:, :1], cache)

        return step

    def _pass(self, num_nodes: int) -> Callable[[], Reading]:
        cache, indices = self._half()
        cache.split_rows()
        depths = torch.arange(num_nodes, device=indices.device).expand(len(indices), -1)
        ancestors = (depths[:, None] <= depths[:, :, None]).contiguous()

        def read() -> Reading:
            cache.rollback_rows(cache.lengths)
            mask = TreeMask(cache.lengths, ancestors)
            return self.model.read_nodes(indices[:, :num_nodes], depths, mask, cache)

        return read

    def _half(self) -> tuple[Any, Tensor]:
        """A cache with half of the tokens of an image, and random tokens."""
        shape = (len(self.rows), self.model.num_tokens)
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(self.model.codebook_size, shape, generator=generator).to(self.model.device)
        cache = self.model.new_cache(len(self.rows))
        self.model.read_prefix(self.rows, cache)
        self.model.step(indices[:, : self.model.num_tokens // 2], cache)
        return cache, indices

    def draft_seconds(self, drafter: Drafter) -> float:
        """Seconds to draft one tree."""
        reading = self.model.read_prefix(self.rows, self.model.new_cache(len(self.rows)))
        scales = torch.full((self.model.num_tokens,), self.guidance.scale, device=self.model.device)
        is_guided = self.guidance.scale != 1.0
        start = DraftStart(self.model, self.rows, reading, scales, SamplingParams(), is_guided, 1)
        session, streams = drafter.begin(start), ImageStreams.from_seeds([0])
        root = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        return self.median([lambda: session.propose(root, root, streams)])[0]

    def run(
        self, drafter: Drafter, num_drafted: int, name: str, num_parameters: int, target: PassTime
    ) -> Run:
        """Draw with and without the drafter."""
        passes: list[int] = []

        def speculative() -> None:
            result = generate_speculative(self.model, self.label, drafter=drafter, **self._options())
            passes.append(result.statistics.target_passes)

        def plain() -> None:
            generate_ordered(self.model, self.label, **self._options())

        spent, plain_spent = self.median([speculative, plain])
        return Run(
            drafter=name,
            num_drafted=num_drafted,
            num_parameters=num_parameters,
            tokens_per_pass=(self.num_tokens - 1) / passes[-1],
            speed_up=plain_spent / spent,
            seconds_per_pass=spent / passes[-1],
            target_seconds=target.seconds,
            draft_seconds=self.draft_seconds(drafter),
            plain_seconds=plain_spent / (self.num_tokens - 1),
        )

    def _options(self) -> dict[str, Any]:
        streams = ImageStreams.from_seeds([0])
        return {"streams": streams, "guidance": self.guidance, "num_tokens": self.num_tokens}


def drafters(model: NextTokenGenerator, num_drafted: int) -> dict[str, tuple[Drafter, int]]:
    """Name -> a drafter of chains, with networks of random weights, and its parameters."""
    sizes = {
        name: model.config[name] for name in ("codebook_size", "num_tokens", "dim", "num_heads", "mlp_dim")
    }
    eagle: Any = EagleDrafter(**sizes, prefix_length=0, own_tokens=False)
    small: Any = type(model).from_config({**model.config, "depth": min(SMALL_DEPTH, model.config["depth"])})
    for network in (eagle, small):
        network.eval().to(model.device, model.dtype)
    shape = TreeShape.chain(num_drafted)
    return {
        "Jacobi": (JacobiDrafter(num_drafted), 0),
        "EAGLE": (EagleTreeDrafter(eagle, shape), _size(eagle)),
        f"generator of {SMALL_DEPTH} blocks": (IndependentDrafter(small, shape), _size(small)),
    }


def _size(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


@torch.inference_mode()
def measure(family: str, bench: Bench, num_drafted: Sequence[int]) -> Measurement:
    """All times of a generator.

    Args:
        family: what the measurement is called.
        bench: the generator.
        num_drafted: lengths of the chains that are drafted.

    Raises:
        ValueError: the generator is no next-token generator.
    """
    model = bench.model
    if not isinstance(model, NextTokenGenerator):
        raise ValueError(
            f"{family} does not decide one token after the other: there is nothing to speculate about"
        )
    step_seconds, passes = bench.pass_times([1, *(count + 1 for count in num_drafted)])
    runs = []
    for count, target in zip(num_drafted, passes[1:], strict=True):
        torch.manual_seed(0)
        for name, (drafter, num_parameters) in drafters(model, count).items():
            runs.append(bench.run(drafter, count, name, num_parameters, target))
            sys.stderr.write(f"{runs[-1]}\n")
    return Measurement(
        family=family,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=_size(model),
        weights_mib=weight_bytes(model) / MIB,
        step_seconds=step_seconds,
        passes=passes,
        runs=runs,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    from vistok.eval.speculative_speed_report import write_report

    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.speculative_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--families", nargs="+", default=["llamagen-b"], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=list(FLOAT_TYPES), choices=FLOAT_TYPES)
    parser.add_argument("--num-drafted", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--num-tokens", type=int, default=64, help="of an image")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    check_plotting()
    options.out.mkdir(parents=True, exist_ok=True)
    measurements = []
    for family in options.families:
        for dtype in options.dtypes:
            model: Any = build_subject(family).model
            model.to(options.device, FLOAT_TYPES[dtype])
            bench = Bench(model, options.num_tokens, options.guidance_scale, options.repeats)
            measurements.append(measure(family, bench, options.num_drafted))
    report = SpeedReport(
        measurements,
        num_tokens=options.num_tokens,
        guidance_scale=options.guidance_scale,
        repeats=options.repeats,
        num_threads=torch.get_num_threads(),
        device=options.device,
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
