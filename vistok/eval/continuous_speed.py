"""Time of the continuous generators at full size on the CPU: `python -m vistok.eval.continuous_speed -o FOLDER`.

xAR-B and MAR-B draw images of 256 tokens, with guidance. Weights are random: time does not depend on them. Each is timed as
the package draws and with every way to draw faster, beside the plain way (`plain_continuous`), float32 and whole sequences
again in every step. The time of the parts is taken around them in the same run. Before that, both must draw the same tokens
from the same noise. Writes `continuous-speed.json` and `report.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.speculative.continuous import SpeculationParams
from vistok.decoding.streams import ImageStreams
from vistok.eval.continuous_ways import (
    DISA_LAST_TIMESTEP,
    DRAFT,
    FAMILIES,
    PARTS,
    PLAIN,
    PUBLISHED,
    Family,
    Methods,
    Way,
    build_family,
)
from vistok.eval.machine import describe_machine, threads_in_words
from vistok.eval.markdown import table
from vistok.eval.speed_ways import FLOAT_TYPES
from vistok.files import atomic_path
from vistok.tokens import Tokens

# Of the largest value: both ways sum in another order, and every step amplifies what that makes.
LARGEST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Measurement:
    """One way to draw from one family."""

    family: str
    way: str
    steps: str
    dtype: str
    batch_size: int
    every: int  # one in so many steps was done, and the times multiplied
    seconds_per_image: float  # median batch / batch_size
    parts: dict[str, float]  # seconds per image of the same run


@dataclass(frozen=True)
class SpeedReport:
    """All measurements with their protocol."""

    measurements: list[Measurement]
    parameters: dict[str, dict[str, int]]  # family -> network -> number
    differences: dict[str, float]  # family -> between the plain way and the package's, of the largest value
    repeats: int
    num_threads: int
    machine: str


@torch.inference_mode()
def plain_difference(family: Family) -> float:
    """Largest difference of the package's tokens from those of the plain way, at few steps, over the largest value."""
    few = family.with_few_steps()
    plain, own = (_data(way.draw(*_inputs(1))) for way in (few.plain_ways(1)[0], few.ways()[0]))
    return ((own - plain).abs().max() / plain.abs().max()).item()


def check_difference(name: str, family: Family) -> float:
    """The difference; raises ValueError if it is too large, as times of different functions mean nothing."""
    difference = plain_difference(family)
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"{name}: tokens of the plain way and of the package differ by {difference:.3g} of the largest, more than "
            f"{LARGEST_DIFFERENCE:.3g}; they do not compute the same, so their times are not compared"
        )
    return difference


def _data(drawn: Tokens | Tensor) -> Tensor:
    return drawn.data if isinstance(drawn, Tokens) else drawn


def _inputs(batch_size: int) -> tuple[Tensor, ImageStreams]:
    return torch.arange(batch_size), ImageStreams.from_seeds(range(batch_size))


@torch.inference_mode()
def measure(
    name: str, family: Family, *, dtypes: Sequence[str], batch_sizes: Sequence[int], repeats: int, every: int
) -> Iterator[Measurement]:
    """Time all ways of a family, the plain ones in float32 first. At the end its weights are of the last type.

    Args:
        name: of the family.
        family: with weights in float32.
        dtypes: of the package's ways.
        batch_sizes: images at a time.
        repeats: timed runs of each; the median counts.
        every: the plain way does one in so many of its steps.

    Raises:
        ValueError: `every` does not divide the steps.
    """
    plain = family.plain_ways(every)
    for batch_size in batch_sizes:
        for way in plain:
            yield _measure_way(name, way, "float32", batch_size, repeats)
    for dtype in dtypes:
        for network in family.networks.values():
            network.to(FLOAT_TYPES[dtype])
        for way in family.with_few_steps().ways():  # the first call of a kind takes longer
            way.draw(*_inputs(1))
        for batch_size in batch_sizes:
            for way in family.ways():
                yield _measure_way(name, way, dtype, batch_size, repeats)


def _measure_way(family: str, way: Way, dtype: str, batch_size: int, repeats: int) -> Measurement:
    runs = []
    for _ in range(repeats):
        with watched(way.parts) as parts:
            started = time.perf_counter()
            way.draw(*_inputs(batch_size))
            runs.append((time.perf_counter() - started, parts))
    seconds, parts = sorted(runs, key=lambda run: run[0])[(repeats - 1) // 2]
    factor = way.every / batch_size
    return Measurement(
        family=family,
        way=way.name,
        steps=way.steps,
        dtype=dtype,
        batch_size=batch_size,
        every=way.every,
        seconds_per_image=factor * seconds,
        parts={part: factor * spent for part, spent in parts.items()},
    )


@contextmanager
def watched(parts: Sequence[Methods]) -> Iterator[dict[str, float]]:
    """Seconds spent in the methods of each of `PARTS` until the context is left; methods must not call one another."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for part, methods in zip(PARTS, parts, strict=True):
        for owner, name in methods:
            setattr(owner, name, _timed(getattr(owner, name), part, seconds))
    try:
        yield seconds
    finally:
        for owner, name in (method for methods in parts for method in methods):
            delattr(owner, name)  # of the object itself; that of its class stays


def _timed(method: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments, **options)
        seconds[part] += time.perf_counter() - started
        return result

    return call


def write_report(result: SpeedReport, folder: Path) -> None:
    """Write `continuous-speed.json` and `report.md` into an existing folder."""
    with atomic_path(folder / "continuous-speed.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(result), encoding="utf-8")


def _page(result: SpeedReport) -> str:
    header = [
        "Family",
        "Way",
        "Steps",
        "Type",
        "Batch",
        "Seconds per image",
        "Encoder",
        "Decoder",
        "Head",
        "Rest",
    ]
    header += ["Faster than plain", "Than plain, published steps"]
    sizes = ", ".join(
        f"{name} of {family} {count / 1e6:.0f} M parameters"
        for family, networks in result.parameters.items()
        for name, count in networks.items()
    )
    shares = {m.every for m in result.measurements if m.every > 1}
    differences = ", ".join(f"{family} {value:.1e}" for family, value in result.differences.items())
    lines = [
        "# Time of the continuous generators on the CPU",
        "",
        *table(header, (_cells(result, m) for m in result.measurements), num_labels=5),
        "",
        f"- Class-conditional, 256 tokens of 16 channels for 256 pixels, random weights: {sizes}. Tokens only: no "
        "tokenizer.",
        "- Steps: of the order x flow or denoising steps at each. Guidance at all of them, at the published scales; both "
        "branches are one batch.",
        "- Plain: float32, nothing kept. xAR: every flow step is fed all cells so far. MAR: encoder and decoder run over "
        "all positions in every step (the release leaves hidden tokens out of the encoder, as the package does), and "
        "every denoising step makes its modulations again.",
        *(
            f"- Where the plain way did one in {every} of its steps, spread evenly, its times are multiplied by it."
            for every in sorted(shares)
        ),
        "- Decoding: the package, which changes nothing in the result: xAR keeps the cells before and makes modulations "
        "once per class and time; MAR leaves hidden tokens out of the encoder, asks the last block of the decoder for the "
        "tokens of the step alone, and makes modulations for many denoising steps at once.",
        f"- DiSA: the published annealing; chains of MAR begin at timestep {DISA_LAST_TIMESTEP}. Context reuse: every other "
        f"evaluation is cheap. Speculation: {_speculation_words()}. These three change what is drawn.",
        "- Head: of MAR its denoiser, of xAR the modulations of its blocks. Rest: noise, integration, guidance, "
        "bookkeeping.",
        f"- Difference of the package's tokens from the plain way's at few steps, float32, as a share of the largest "
        f"value; checked before anything is timed: {differences}.",
        f"- Median of {result.repeats} run{'s' if result.repeats > 1 else ''} after one with few steps; "
        f"{threads_in_words(result.num_threads)}; {result.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _speculation_words() -> str:
    params = SpeculationParams()
    return (
        f"a draft of {DRAFT['dim']} channels and {DRAFT['encoder_depth']} + {DRAFT['decoder_depth']} blocks, which is no "
        f"released model, verified every {params.num_draft} steps after {100 * params.prefill:.0f} % of them; "
        "no time depends on what is accepted"
    )


def _cells(result: SpeedReport, m: Measurement) -> list[str]:
    rest = m.seconds_per_image - sum(m.parts.values())
    shares = [100 * spent / m.seconds_per_image for spent in (*m.parts.values(), rest)]
    return [
        *(m.family, m.way, m.steps, m.dtype, str(m.batch_size)),
        f"{m.seconds_per_image:.3g}",
        *(f"{share:.0f} %" for share in shares),
        *(_speedup(result, m, way) for way in (PLAIN, PUBLISHED)),
    ]


def _speedup(result: SpeedReport, m: Measurement, plain: str) -> str:
    """Over a plain way of the same family and batch; a dash where there is none."""
    for other in result.measurements:
        if (other.family, other.way, other.batch_size) == (m.family, plain, m.batch_size):
            return f"{other.seconds_per_image / m.seconds_per_image:.2f}"
    return "-"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.continuous_speed", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=list(FLOAT_TYPES), choices=FLOAT_TYPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        help="the plain way does one in so many steps, and its time is multiplied",
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    measurements, parameters, differences = [], {}, {}
    for name in options.families:
        family = build_family(name)
        parameters[name] = {
            network: sum(weight.numel() for weight in model.parameters())
            for network, model in family.networks.items()
        }
        differences[name] = check_difference(name, family)
        for measurement in measure(
            name,
            family,
            dtypes=options.dtypes,
            batch_sizes=options.batch_sizes,
            repeats=options.repeats,
            every=options.every,
        ):
            sys.stderr.write(f"{measurement}\n")
            measurements.append(measurement)
    result = SpeedReport(
        measurements,
        parameters,
        differences,
        repeats=options.repeats,
        num_threads=torch.get_num_threads(),
        machine=str(describe_machine()),
    )
    write_report(result, options.out)
    sys.stdout.write(json.dumps(asdict(result), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
