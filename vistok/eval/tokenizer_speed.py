"""Time and memory of the tokenizer families at full size: `python -m vistok.eval.tokenizer_speed -o FOLDER`.

Weights are random: neither time nor memory depends on them. Each operation is timed beside the plainest composition of
the same layers with the same weights (`plain_tokenizers`), in turns, so that both meet the same machine; before that,
both must give the same result. Writes `tokenizer-speed.json` and `report.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vistok.eval.machine import describe_machine
from vistok.eval.markdown import table
from vistok.eval.peak_memory import MIB, peak_memory
from vistok.eval.plain_tokenizers import FLEXTOK_GUIDANCE, FLEXTOK_STEPS, plain_decode, plain_encode
from vistok.eval.random_weights import randomize
from vistok.eval.timing import median_seconds
from vistok.files import atomic_path
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
    """One operation of one family, ours beside the plain composition."""

    family: str
    operation: str
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
    dtype: str
    machine: str


class Operation(NamedTuple):
    """What is measured: both ways of computing it, and how far apart they may be."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any]
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
    family: str, tokenizer: ImageTokenizer, *, batch_size: int, repeats: int, num_steps: int = FLEXTOK_STEPS
) -> Iterator[Measurement]:
    """Time every operation of a tokenizer, after a check that ours and the plain one agree.

    Args:
        family: what the measurements are called.
        tokenizer: in evaluation mode, on the device to be measured.
        batch_size: images.
        repeats: timed runs of each; the median counts.
        num_steps: of a decoder that draws its images.

    Raises:
        ValueError: they do not agree; times of different functions mean nothing.
    """
    size = tokenizer.image_size
    images = torch.rand(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for operation in _operations(tokenizer, images.to(tokenizer.device), num_steps):
        difference = _checked_difference(family, operation)
        ours_mib, plain_mib = (
            peak_memory(call, tokenizer.device) for call in (operation.ours, operation.plain)
        )
        calls = (operation.ours, operation.plain)
        seconds, plain_seconds = median_seconds(calls, repeats, tokenizer.device)
        yield Measurement(
            family,
            operation.name,
            batch_size,
            seconds,
            plain_seconds,
            ours_mib,
            plain_mib,
            difference,
        )


def _operations(tokenizer: ImageTokenizer, images: Tensor, num_steps: int) -> Iterator[Operation]:
    yield Operation(
        "encode",
        lambda: tokenizer.encode(images),
        lambda: plain_encode(tokenizer, images),
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
            lambda tokens=tokens: tokenizer.decode(tokens, **options),  # type: ignore[misc]
            lambda tokens=tokens: plain_decode(tokenizer, tokens, num_steps),  # type: ignore[misc]
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


def _checked_difference(family: str, operation: Operation) -> float:
    ours, plain = operation.ours(), operation.plain()
    if isinstance(ours, Tokens):
        difference = (ours.data != plain.data).float().mean().item()
    else:
        difference = (ours - plain).abs().max().item()
    if not difference <= operation.limit:
        raise ValueError(
            f"{family}, {operation.name}: ours and the plain composition differ by {difference:.3g}, more than "
            f"{operation.limit:.3g}; they do not compute the same, so their times are not compared"
        )
    return difference


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
        *table(header, map(_cells, result.measurements), num_labels=2),
        "",
        "- Full sizes of the releases, random weights: "
        + ", ".join(
            f"{family} {number / 1e6:.0f} M parameters ({result.weights_mib[family]:.0f} MiB)"
            for family, number in result.parameters.items()
        )
        + ".",
        "- Plain: the same layers and weights with attention written out as softmax(q k^T) v, images of different "
        "lengths one by one, and, in FlexTok, every register and modulation computed anew at each step.",
        f"- Seconds: median of {result.repeats} runs after two others, in turns with the plain one, batches of "
        f"{', '.join(sorted({str(m.batch_size) for m in result.measurements}))}, {result.num_threads} threads. "
        f"FlexTok decodes with {result.num_steps} steps and guidance {FLEXTOK_GUIDANCE}.",
        "- Peak: memory of the whole batch beyond weights and inputs. Difference: share of tokens that differ, or "
        "the largest difference of images in [-1, 1].",
        f"- {result.dtype} on {result.device}; {result.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(m: Measurement) -> list[str]:
    peaks = ["" if mib is None else f"{mib:.0f}" for mib in (m.peak_mib, m.plain_peak_mib)]
    seconds = [f"{total / m.batch_size:.3f}" for total in (m.seconds, m.plain_seconds)]
    return [
        m.family,
        m.operation,
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
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
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
        dtype="float32",
        machine=str(describe_machine()),
    )
    write_report(result, options.out)
    sys.stdout.write(json.dumps(asdict(result), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
