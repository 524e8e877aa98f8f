"""Continuous batching against batches that are drawn as a whole: `python -m vistok.eval.serving_speed -o FOLDER`.

The same requests come at the same Poisson times to three ways of serving them on the same machine: `continuous`
(`vistok.decoding.serving.Server`), `full batches`, which waits for a full batch, draws it, and waits for the next, and
`what waits`, which draws whatever waits as soon as it has nothing else to do. Images have all tokens (`all`) or a
quarter, half or all of them (`mixed`). Before anything is timed, the tokens of requests that join and leave a running
batch must be those that the plain loop draws for each alone. Writes `serving-speed.json` and `report.md`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vistok.decoding.compiled import CompiledGenerator
from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.serving import Request, Server, Ticket
from vistok.decoding.streams import ImageStreams
from vistok.eval.machine import describe_machine, threads_in_words
from vistok.eval.markdown import table
from vistok.eval.speed_families import build_subject
from vistok.eval.speed_ways import FLOAT_TYPES
from vistok.files import atomic_path
from vistok.hub import load_pipeline
from vistok.models.generators.base import Condition, NextTokenGenerator, join_conditions
from vistok.pipelines.settings import OrderedSettings
from vistok.tokens import Tokens

PROMPTS = ("red apple", "rocket", "dog face", "green leaf", "pizza", "crying cat", "sun", "blue book")
GUIDANCE_SCALE = 2.0  # of LlamaGen
PARITY_IMAGES = 4
PARITY_STEPS = 3  # between their arrivals
SHARES = {"all": (1.0,), "mixed": (0.25, 0.5, 1.0)}  # of an image's tokens, in turn by chance


@dataclass(frozen=True)
class Subject:
    """A generator, and how the images that are asked of it are drawn.

    Args:
        name: of the model.
        model: in evaluation mode.
        conditions: of one row each, asked for in turn.
        sampling, guidance: of all images.
        compiled: the model with compiled steps, where they are to be.
    """

    name: str
    model: NextTokenGenerator
    conditions: list[Condition]
    sampling: SamplingParams
    guidance: GuidanceSchedule
    compiled: CompiledGenerator | None = None

    @property
    def steps(self) -> NextTokenGenerator | CompiledGenerator:
        """What draws."""
        return self.model if self.compiled is None else self.compiled

    def with_compiled_steps(self) -> Subject:
        """The same model, compiled."""
        return replace(self, name=f"{self.name}, compiled", compiled=CompiledGenerator(self.model))

    @property
    def rows_per_image(self) -> int:
        """Of the model."""
        return 1 if self.guidance.scale == 1.0 else 2

    def requests(self, count: int, lengths: str) -> list[Request]:
        """The first `count` images that are asked for; image i has the seed i. `lengths` is one of `SHARES`."""
        generator = torch.Generator().manual_seed(0)
        shares = torch.tensor(SHARES[lengths])
        chosen = shares[torch.randint(len(shares), (count,), generator=generator)].tolist()
        return [
            Request(
                self.conditions[i % len(self.conditions)],
                seed=i,
                num_tokens=max(1, round(share * self.model.num_tokens)),
                sampling=self.sampling,
                guidance=self.guidance,
            )
            for i, share in enumerate(chosen)
        ]


@dataclass(frozen=True)
class Run:
    """How one way served all requests."""

    model: str
    dtype: str
    lengths: str
    load: float
    requests_per_second: float  # that came, on average
    way: str
    images_per_second: float  # from the first arrival to the last image
    mean_latency: float  # seconds from an arrival to its image
    latency_95: float  # which 95 % of them do not exceed


@dataclass(frozen=True)
class ServingReport:
    """All runs with their protocol."""

    runs: list[Run]
    capacities: dict[
        str, float
    ]  # model and dtype -> images per second in full batches, one right after the other
    parameters: dict[str, int]  # model -> number
    num_slots: int
    num_images: int
    device: str
    num_threads: int
    machine: str


def load_emoji() -> Subject:
    """The shipped text-to-emoji generator with its own settings."""
    pipeline = load_pipeline("emoji-64")
    settings = OrderedSettings(**pipeline.sampling_settings())
    model: Any = pipeline.transformer
    texts = [model.encode_text([prompt]) for prompt in PROMPTS]
    return Subject("emoji-64", model, texts, settings.sampling, settings.guidance(model.order))


def make_llamagen() -> Subject:
    """LlamaGen-B with random weights, on which time does not depend."""
    model: Any = build_subject("llamagen-b").model
    labels: list[Condition] = [torch.tensor([label]) for label in range(model.num_classes)]
    return Subject("llamagen-b", model, labels, SamplingParams(), ConstantGuidance(GUIDANCE_SCALE))


MODELS: dict[str, Callable[[], Subject]] = {"emoji-64": load_emoji, "llamagen-b": make_llamagen}


def draw_together(model: NextTokenGenerator | CompiledGenerator, requests: Sequence[Request]) -> Tokens:
    """The images of some requests that differ in condition, seed and number of tokens only, as one batch."""
    return generate_ordered(
        model,
        functools.reduce(join_conditions, [request.condition for request in requests]),
        streams=ImageStreams.from_seeds([request.seed for request in requests]),
        num_tokens=[request.num_tokens or model.num_tokens for request in requests],
        sampling=requests[0].sampling,
        guidance=requests[0].guidance,
    )


def check_parity(subject: Subject, num_slots: int) -> None:
    """Serve a few images that join and leave while others are drawn, and compare each with what it is alone.

    Raises:
        ValueError: one differs; times of different functions mean nothing.
    """
    server, tickets = Server(subject.model, num_slots=num_slots, feed=subject.steps.feed), []
    for request in subject.requests(PARITY_IMAGES, "mixed"):
        tickets.append(server.submit(request))
        for _ in range(PARITY_STEPS):
            server.step()
    _ = list(server.run())
    for number, ticket in enumerate(tickets):
        served, alone = ticket.result().data, draw_together(subject.model, [ticket.request]).data
        if not torch.equal(served, alone):
            place = int((served != alone)[0].nonzero()[0])
            raise ValueError(
                f"{subject.name}: image {number} differs from token {place} on when it is drawn in company; "
                "the ways do not draw the same, so their times are not compared"
            )


class Way(Protocol):
    """A way of serving; requests are named by their number."""

    def submit(self, number: int) -> None:
        """A request has come."""
        ...

    def work(self, more_will_come: bool) -> list[int] | None:
        """Do something; returns the requests that are done by it, `None` if there was nothing to do."""
        ...


class Continuous:
    """`Server`, a step at a time."""

    def __init__(self, subject: Subject, requests: list[Request], num_slots: int) -> None:
        feed = subject.steps.feed
        self.server = Server(subject.model, num_slots=num_slots, max_waiting=None, feed=feed)
        self.requests = requests
        self.numbers: dict[Ticket, int] = {}

    def submit(self, number: int) -> None:
        self.numbers[self.server.submit(self.requests[number])] = number

    def work(self, more_will_come: bool) -> list[int] | None:
        if not self.server.num_waiting and not self.server.num_running:
            return None
        return [self.numbers[ticket] for ticket in self.server.step()]


class Batches:
    """One batch after the other.

    Args:
        model: draws them, compiled or not.
        requests: all that will come.
        batch_size: the most images of a batch.
        waits: for a full batch, while more requests will come.
    """

    def __init__(
        self,
        model: NextTokenGenerator | CompiledGenerator,
        requests: list[Request],
        batch_size: int,
        *,
        waits: bool,
    ) -> None:
        self.model, self.requests = model, requests
        self.batch_size, self.waits = batch_size, waits
        self.waiting: list[int] = []

    def submit(self, number: int) -> None:
        self.waiting.append(number)

    def work(self, more_will_come: bool) -> list[int] | None:
        is_short = len(self.waiting) < self.batch_size
        if not self.waiting or (self.waits and is_short and more_will_come):
            return None
        batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        draw_together(self.model, [self.requests[number] for number in batch])
        return batch


def poisson_arrivals(count: int, rate: float) -> list[float]:
    """Seconds at which requests come, `rate` per second on average, the first at 0."""
    uniforms = torch.rand(count - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [0.0, *(-(1 - uniforms).log() / rate).cumsum(0).tolist()]


def play(way: Way, arrivals: Sequence[float]) -> list[float]:
    """Let requests come at their times; returns when each was done, in seconds after the first arrival."""
    ends = [0.0] * len(arrivals)
    num_come = num_done = 0
    started = time.perf_counter()
    while num_done < len(arrivals):
        now = time.perf_counter() - started
        while num_come < len(arrivals) and arrivals[num_come] <= now:
            way.submit(num_come)
            num_come += 1
        done = way.work(num_come < len(arrivals))
        if done is None:
            time.sleep(max(0.0, arrivals[num_come] - (time.perf_counter() - started)))
            continue
        now = time.perf_counter() - started
        for number in done:
            ends[number] = now
        num_done += len(done)
    return ends


def measure_capacity(subject: Subject, batch_size: int) -> float:
    """Images per second of full batches of whole images, one right after the other, when all has run before."""
    requests = subject.requests(batch_size, "all")
    for count in sorted(
        {batch_size, 1, min(2, batch_size)}
    ):  # what is compiled for two sizes serves all others
        draw_together(subject.steps, requests[:count])
    started = time.perf_counter()
    draw_together(subject.steps, requests)
    return batch_size / (time.perf_counter() - started)


def measure(
    subject: Subject, capacity: float, *, lengths: str, load: float, num_images: int, num_slots: int
) -> list[Run]:
    """Serve the same requests in all ways.

    Args:
        subject: what is asked for.
        capacity: see `measure_capacity`.
        lengths: see `SHARES`.
        load: requests per second, as a share of the capacity.
        num_images: requests.
        num_slots: rows of a batch, in all ways.
    """
    model, requests = subject.steps, subject.requests(num_images, lengths)
    batch_size = num_slots // subject.rows_per_image
    ways: dict[str, Way] = {
        "full batches": Batches(model, requests, batch_size, waits=True),
        "what waits": Batches(model, requests, batch_size, waits=False),
        "continuous": Continuous(subject, requests, num_slots),
    }
    arrivals = poisson_arrivals(num_images, load * capacity)
    runs = []
    for name, way in ways.items():
        ends = play(way, arrivals)
        latencies = torch.tensor(ends, dtype=torch.float64) - torch.tensor(arrivals, dtype=torch.float64)
        run = Run(
            model=subject.name,
            dtype=str(subject.model.dtype).removeprefix("torch."),
            lengths=lengths,
            load=load,
            requests_per_second=load * capacity,
            way=name,
            images_per_second=num_images / max(ends),
            mean_latency=latencies.mean().item(),
            latency_95=latencies.quantile(0.95).item(),
        )
        sys.stderr.write(f"{run}\n")
        runs.append(run)
    return runs


def write_report(result: ServingReport, folder: Path) -> None:
    """Write `serving-speed.json` and `report.md` into an existing folder."""
    with atomic_path(folder / "serving-speed.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(result), encoding="utf-8")


def _page(result: ServingReport) -> str:
    labels = ["Model", "Type", "Tokens", "Way"]
    figures = ["Load", "Requests/s", "Images/s", "Mean latency, s", "95 % latency, s"]
    capacities = ", ".join(f"{name} {images:.2f}" for name, images in result.capacities.items())
    parameters = ", ".join(f"{name} {n / 1e6:.0f} M parameters" for name, n in result.parameters.items())
    lines = [
        "# Serving: continuous batching against whole batches",
        "",
        *table(labels + figures, map(_cells, result.runs), num_labels=len(labels)),
        "",
        f"- {result.num_images} requests each, at the same Poisson times for all ways; {result.num_slots} rows of the "
        f"model, of which a guided image takes two. Tokens only: no tokenizer. {parameters}.",
        f"- Load: requests per second, as a share of the images per second of full batches of whole images, one right "
        f"after the other ({capacities}).",
        "- Images/s: from the first arrival to the last image, so it cannot exceed what was asked for. Latency: from an "
        "arrival to its image.",
        "- Full batches: waits until a batch is full or nobody else comes. What waits: draws what is there as soon as it "
        "is idle. Continuous: `vistok.decoding.serving.Server`.",
        "- Tokens: all of an image, or a quarter, half or all of them by chance (mixed).",
        f"- Checked before anything was timed, in float32: {PARITY_IMAGES} images that join and leave a running batch are "
        "those that are drawn alone, token for token.",
        f"- On {result.device}; {threads_in_words(result.num_threads)}; {result.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(run: Run) -> list[str]:
    figures = [run.requests_per_second, run.images_per_second, run.mean_latency, run.latency_95]
    return [run.model, run.dtype, run.lengths, run.way, f"{run.load:g}", *(f"{x:.2f}" for x in figures)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.serving_speed", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--models", nargs="+", default=["emoji-64"], choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=FLOAT_TYPES)
    parser.add_argument("--lengths", nargs="+", default=list(SHARES), choices=SHARES)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.9, 1.5])
    parser.add_argument("--images", type=int, default=64, help="requests of each run")
    parser.add_argument("--slots", type=int, default=16, help="rows of the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the steps of all ways")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runs, capacities, parameters = [], {}, {}
    for name in options.models:
        plain = MODELS[name]()
        model: Any = plain.model
        parameters[name] = sum(weight.numel() for weight in model.parameters())
        model.to(options.device)
        check_parity(plain, options.slots)
        for dtype in options.dtypes:
            model.to(FLOAT_TYPES[dtype])
            subject = plain.with_compiled_steps() if options.compile else plain
            if dtype == "float32":
                check_parity(subject, options.slots)  # and compiles for the numbers of rows that a server has
            capacity = measure_capacity(subject, options.slots // subject.rows_per_image)
            capacities[f"{subject.name} {dtype}"] = capacity
            for lengths in options.lengths:
                for load in options.loads:
                    runs += measure(
                        subject,
                        capacity,
                        lengths=lengths,
                        load=load,
                        num_images=options.images,
                        num_slots=options.slots,
                    )
    result = ServingReport(
        runs,
        capacities,
        parameters,
        num_slots=options.slots,
        num_images=options.images,
        device=options.device,
        num_threads=torch.get_num_threads(),
        machine=str(describe_machine()),
    )
    write_report(result, options.out)
    sys.stdout.write(json.dumps(asdict(result), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
