"""Time and memory of the tokenizer families at full size: `python -m vistok.eval.tokenizer_speed -o FOLDER`.

Weights are random: neither time nor memory depends on them. Each operation is timed beside the plainest composition of
the same layers with the same weights in float32 (`plain_tokenizers`), in turns, so that all meet the same machine; before
that, they must give the same result: in float32 but for rounding, in a lower precision with an error of at most twice that
of the plain composition in it. Writes `tokenizer-speed.json` and `report.md`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vistok.eval.machine import describe_machine
from vistok.eval.markdown import table
from vistok.eval.peak_memory import MIB, peak_memory
from vistok.eval.plain_tokenizers import FLEXTOK_GUIDANCE, FLEXTOK_STEPS, plain_decode, plain_encode
from vistok.eval.random_weights import randomize
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
from vistok.models.compiling import compile_model
from vistok.models.tokenizers import flextok, one_d_piece, titok
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.flextok import FlexTok
from vistok.tokens import Tokens

FAMILIES = (
    "titok-l-32",
    "one-d-piece-s-256",
    "one-d-piece-b-256",
    "one-d-piece-l-256",
    "flextok-d12-d12-in1k",
)
SHORT = 32  # tokens of a short prefix
LEAST_EQUAL_TOKENS = 0.99  # sums in another order move a few latents over the border between two codes
LARGEST_DIFFERENCE = 1e-2  # of images in [-1, 1], after all steps of a decoder


@dataclass(frozen=True)
class Measurement:
    """One operation of one family, ours beside the plain composition in float32."""

    family: str
    operation: str
    way: str  # of ours, see `Way`
    batch_size: int
    seconds: float  # median
    plain_seconds: float
    peak_mib: float | None  # beyond weights and inputs; None where the system does not tell
    plain_peak_mib: float | None
    difference: float  # share of tokens that differ, or the largest difference of images in [-1, 1]


@dataclass(frozen=True)
class SpeedReport:
    """All measurements with their protocol."""

    measurements: list[Measurement]
    parameters: dict[str, int]  # family -> number
    weights_mib: dict[str, float]
    repeats: int
    num_threads: int
    num_steps: int
    device: str
    machine: str


@dataclass(frozen=True)
class Way:
    """How ours runs.

    Args:
        dtype: of the weights; FlexTok's autoencoder stays in float32.
        is_compiled: with `compile_model`.
    """

    dtype: torch.dtype = torch.float32
    is_compiled: bool = False

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + (", compiled" if self.is_compiled else "")

    def prepare(self, tokenizer: ImageTokenizer) -> ImageTokenizer:
        """A float32 tokenizer as it runs this way; a copy, unless that is how it is."""
        if self == Way():
            return tokenizer
        tokenizer = cast(Any, copy.deepcopy(tokenizer)).to(self.dtype)
        if self.is_compiled:
            compile_model(tokenizer)
        return tokenizer


class Operation(NamedTuple):
    """What is measured of any tokenizer: both ways of computing it, and how far apart they may be."""

    name: str
    ours: Callable[[ImageTokenizer], Any]
    plain: Callable[[ImageTokenizer], Any]
    limit: float


def build_tokenizer(family: str) -> ImageTokenizer:
    """A family at full size with random weights; layers that start at zero are made random, so that all compute.

    Raises:
        ValueError: an unknown family.
    """
    presets = {**titok.PRESETS, **one_d_piece.PRESETS, **flextok.PRESETS}
    if family not in presets:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(presets)}")
    tokenizer_class, arguments = presets[family]
    scaling = {"scaling_factor": 1.0} if tokenizer_class is FlexTok else {}
    return randomize(tokenizer_class(**arguments, **scaling)).eval()


@torch.inference_mode()
def measure(
    family: str,
    tokenizer: ImageTokenizer,
    *,
    batch_size: int,
    repeats: int,
    num_steps: int = FLEXTOK_STEPS,
    ways: Sequence[Way] = (Way(),),
) -> Iterator[Measurement]:
    """Time every operation of a tokenizer, after a check that ours and the plain one agree.

    Args:
        family: what the measurements are called.
        tokenizer: float32, in evaluation mode, on the device to be measured.
        batch_size: images.
        repeats: timed runs of each; the median counts.
        num_steps: of a decoder that draws its images.
        ways: how ours runs; all of them are timed beside the plain one in float32.

    Raises:
        ValueError: they do not agree; times of different functions mean nothing.
    """
    size = tokenizer.image_size
    images = torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prepared = {way: way.prepare(tokenizer) for way in ways}
    for operation in _operations(tokenizer, images.to(tokenizer.device), num_steps):
        exact = operation.plain(tokenizer)
        differences = [
            _checked_difference(f"{family}, {operation.name}, {way}", operation, ours, exact)
            for way, ours in prepared.items()
        ]
        calls = [functools.partial(operation.ours, ours) for ours in prepared.values()]
        calls.append(functools.partial(operation.plain, tokenizer))
        *ours_mib, plain_mib = (peak_memory(call, tokenizer.device) for call in calls)
        *seconds, plain_seconds = median_seconds(calls, repeats, tokenizer.device)
        for way, difference, mib, of_way in zip(ways, differences, ours_mib, seconds, strict=True):
            yield Measurement(
                family,
                operation.name,
                str(way),
                batch_size,
                of_way,
                plain_seconds,
                mib,
                plain_mib,
                difference,
            )


def _operations(tokenizer: ImageTokenizer, images: Tensor, num_steps: int) -> Iterator[Operation]:
    yield Operation(
        "encode",
        lambda each: each.encode(images),
        lambda each: plain_encode(each, images),
        1 - LEAST_EQUAL_TOKENS,
    )
    options = (
        {"num_inference_steps": num_steps, "guidance_scale": FLEXTOK_GUIDANCE}
        if isinstance(tokenizer, FlexTok)
        else {}
    )
    for name, tokens in _batches(tokenizer, tokenizer.encode(images)):
        yield Operation(
            f"decode {name}",
            lambda each, tokens=tokens: each.decode(tokens, **options),  # type: ignore[misc]
            lambda each, tokens=tokens: plain_decode(each, tokens, num_steps),  # type: ignore[misc]
            LARGEST_DIFFERENCE,
        )


def _batches(tokenizer: ImageTokenizer, tokens: Tokens) -> Iterator[tuple[str, Tokens]]:
    """All tokens; where prefixes can be decoded, also a short one of each, and both lengths in one batch."""
    longest = tokenizer.num_tokens
    yield f"{longest} tokens", tokens
    short = min(SHORT, longest // 2)
    if tokenizer.variable_length:
        yield f"{short} tokens", tokens.keep(short)
        if len(tokens) > 1:
            lengths = [(longest, short)[row % 2] for row in range(len(tokens))]
            yield f"{longest} and {short} tokens in one batch", tokens.keep(lengths)


def _checked_difference(name: str, operation: Operation, ours: ImageTokenizer, exact: Any) -> float:
    difference, limit = _difference(operation.ours(ours), exact), operation.limit
    if next(ours.encoder.parameters()).dtype != torch.float32:
        limit += 2 * _difference(operation.plain(ours), exact)
    if not difference <= limit:
        raise ValueError(
            f"{name}: ours and the plain composition differ by {difference:.3g}, more than "
            f"{limit:.3g}; they do not compute the same, so their times are not compared"
        )
    return difference


def _difference(found: Any, exact: Any) -> float:
    """The share of tokens that differ, or the largest difference of images."""
    if isinstance(found, Tokens):
        return (found.data != exact.data).float().mean().item()
    return (found.float() - exact.float()).abs().max().item()


def write_report(result: SpeedReport, folder: Path) -> None:
    """Write `tokenizer-speed.json` and `report.md` into an existing folder."""
    with atomic_path(folder / "tokenizer-speed.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(result), encoding="utf-8")


def _page(result: SpeedReport) -> str:
    header = [
        "Family",
        "Operation",
        "Ours",
        "Seconds per image",
        "Plain",
        "Speed-up",
        "Peak MiB",
        "Plain",
        "Difference",
    ]
    lines = [
        "# Time and memory of the tokenizers",
        "",
        *table(header, map(_cells, result.measurements), num_labels=3),
        "",
        "- Full sizes of the releases, random weights: "
        + ", ".join(
            f"{family} {number / 1e6:.0f} M parameters ({result.weights_mib[family]:.0f} MiB)"
            for family, number in result.parameters.items()
        )
        + ".",
        "- Plain: the same layers and weights in float32 with attention written out as softmax(q k^T) v, convolutions "
        "over repeated pixels, images of different lengths one by one, and, in FlexTok, two passes over all registers "
        "at each step, with modulations computed anew.",
        f"- Seconds: median of {result.repeats} runs after two others, all in turns, batches of "
        f"{', '.join(sorted({str(m.batch_size) for m in result.measurements}))}, {result.num_threads} threads. "
        f"FlexTok decodes with {result.num_steps} steps and guidance {FLEXTOK_GUIDANCE}.",
        "- Peak: memory of the whole batch beyond weights and inputs. Difference: share of tokens that differ from "
        "those of the plain one, or the largest difference of images in [-1, 1]. FlexTok's autoencoder is always float32.",
        f"- On {result.device}; {result.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(m: Measurement) -> list[str]:
    peaks = ["" if mib is None else f"{mib:.0f}" for mib in (m.peak_mib, m.plain_peak_mib)]
    seconds = [f"{total / m.batch_size:.3f}" for total in (m.seconds, m.plain_seconds)]
    return [
        m.family,
        m.operation,
        m.way,
        *seconds,
        f"{m.plain_seconds / m.seconds:.2f}",
        *peaks,
        f"{m.difference:.1e}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.tokenizer_speed", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--families", nargs="+", default=FAMILIES, metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=FLEXTOK_STEPS, help="of FlexTok's decoder")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of ours"
    )
    parser.add_argument("--compile", action="store_true", help="also measure ours compiled")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    ways = [
        Way(getattr(torch, dtype), is_compiled)
        for dtype in options.dtypes
        for is_compiled in ((False, True) if options.compile else (False,))
    ]
    measurements, parameters, weights_mib = [], {}, {}
    for family in options.families:
        tokenizer = build_tokenizer(family).to(options.device)
        parameters[family] = sum(weight.numel() for weight in tokenizer.parameters())
        weights_mib[family] = sum(w.numel() * w.element_size() for w in tokenizer.parameters()) / MIB
        for measurement in measure(
            family,
            tokenizer,
            batch_size=options.batch_size,
            repeats=options.repeats,
            num_steps=options.num_steps,
            ways=ways,
        ):
            sys.stderr.write(f"{measurement}\n")
            measurements.append(measurement)
        del tokenizer
    result = SpeedReport(
        measurements,
        parameters,
        weights_mib,
        repeats=options.repeats,
        num_threads=torch.get_num_threads(),
        num_steps=options.num_steps,
        device=options.device,
        machine=str(describe_machine()),
    )
    write_report(result, options.out)
    sys.stdout.write(json.dumps(asdict(result), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
