"""How much memory drawing images with LlamaGen takes: `python -m vistok.eval.memory -o FOLDER`.

At released sizes with random weights, on which memory does not depend. Weights and caches, which are allocated once, are
counted. What else drawing needs is measured while the first tokens of images are drawn with guidance, and so is the peak
of decoding images in batches with the tokenizer that goes with it. Writes memory.json and report.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.eval.machine import describe_machine
from vistok.eval.markdown import table
from vistok.eval.peak_memory import MIB, peak_memory
from vistok.eval.speed_work import cache_bytes
from vistok.files import atomic_path
from vistok.models.generators.llamagen import PRESETS, LlamaGenClass
from vistok.models.quantize import large_layers, quantize_weights, stored_bytes
from vistok.models.tokenizers.vqgan import VQGAN
from vistok.pipelines.decoder import ImageDecoder
from vistok.tokens import Tokens

DTYPE = torch.bfloat16
QUANTIZATIONS = (None, "int8")
NUM_TOKENS = {256: 256, 384: 576}  # by image size
GUIDANCE_SCALE = 2.0
INIT_STD = 0.02
SCALE_BYTES = 4  # of one output channel
JSON_FILE = "memory.json"


@dataclass(frozen=True)
class Counted:
    """What a generator needs whatever the machine, in MiB.

    Args:
        size: published name.
        image_size: pixels per side.
        num_parameters: of the generator.
        weights_mib: in bfloat16, and with the blocks in int8.
        cache_mib: keys and values of one image in bfloat16, both branches of guidance.
    """

    size: str
    image_size: int
    num_parameters: int
    weights_mib: dict[str, float]
    cache_mib: float


@dataclass(frozen=True)
class Peak:
    """What a call needs, in MiB; measured values are `None` where the system does not tell.

    Args:
        what: the model.
        weights: how they are stored.
        image_size: pixels per side.
        num_images: drawn or decoded.
        weights_mib: of the model.
        cache_mib: of whole images, counted.
        working_mib: measured peak beyond both.
    """

    what: str
    weights: str
    image_size: int
    num_images: int
    weights_mib: float
    cache_mib: float
    working_mib: float | None

    @property
    def total_mib(self) -> float | None:
        """All of it."""
        return None if self.working_mib is None else self.weights_mib + self.cache_mib + self.working_mib


@dataclass(frozen=True)
class MemoryReport:
    """Everything, with the machine."""

    counted: list[Counted]
    drawing: list[Peak]
    decoding: list[Peak]
    guidance_scale: float
    num_tokens: int  # drawn of every image for the working memory
    dtype: str
    machine: str


def count(size: str, image_size: int) -> Counted:
    """The weights and the cache of one size; nothing is allocated."""
    with torch.device("meta"):
        model: Any = LlamaGenClass(**PRESETS[size], num_tokens=NUM_TOKENS[image_size]).to(DTYPE)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    stored = stored_bytes(model)
    layers_in_int8 = [model.get_submodule(name) for name in large_layers(model)]
    saved = sum(layer.weight.numel() - SCALE_BYTES * layer.out_features for layer in layers_in_int8)
    return Counted(
        size=size,
        image_size=image_size,
        num_parameters=num_parameters,
        weights_mib={"bfloat16": stored / MIB, "int8": (stored - saved) / MIB},
        cache_mib=cache_mib(model, 1),
    )


def cache_mib(model: LlamaGenClass, num_images: int, num_tokens: int | None = None) -> float:
    """Of images with guidance, all tokens of them by default, in MiB; a model in the dtype of `model`."""
    return cache_bytes(model, num_images, num_tokens or model.num_tokens) / MIB


def build(model_class: Any, device: torch.device, **config: Any) -> Any:
    """A model in `DTYPE` with random weights, in evaluation mode, that was never larger."""
    with torch.device("meta"):
        model = model_class(**config).to(DTYPE)
    model.to_empty(device=device)
    for weight in [*model.parameters(), *model.buffers()]:
        nn.init.normal_(weight, std=INIT_STD)
    return model.eval().requires_grad_(False)


def drawing_peaks(
    size: str, image_size: int, batch_sizes: Sequence[int], num_tokens: int, device: torch.device
) -> list[Peak]:
    """Of images of one size, of which `num_tokens` are drawn, with weights in bfloat16 and in int8."""
    peaks = []
    for quantization in QUANTIZATIONS:
        model = build(LlamaGenClass, device, **PRESETS[size], num_tokens=NUM_TOKENS[image_size])
        if quantization is not None:
            quantize_weights(model, quantization)
        draw_images(model, 1, 2)  # what a first call costs once
        for num_images in batch_sizes:
            peak = peak_memory(partial(draw_images, model, num_images, num_tokens), device)
            peaks.append(
                Peak(
                    what=f"LlamaGen-{size}",
                    weights=quantization or "bfloat16",
                    image_size=image_size,
                    num_images=num_images,
                    weights_mib=stored_bytes(model) / MIB,
                    cache_mib=cache_mib(model, num_images),
                    working_mib=None if peak is None else peak - cache_mib(model, num_images, num_tokens),
                )
            )
            sys.stderr.write(f"{peaks[-1]}\n")
        del model
    return peaks


def draw_images(model: LlamaGenClass, num_images: int, num_tokens: int) -> Tokens:
    """The first tokens of images of class 0, with guidance."""
    return generate_ordered(
        model,
        torch.zeros(num_images, dtype=torch.int64),
        streams=ImageStreams.from_seeds(range(num_images)),
        num_tokens=num_tokens,
        guidance=ConstantGuidance(GUIDANCE_SCALE),
    )


def decoding_peaks(image_size: int, counts: Sequence[int], device: torch.device) -> list[Peak]:
    """Of some numbers of images decoded to pictures, in the batches that a pipeline uses."""
    tokenizer = build(VQGAN, device, image_size=image_size)
    peaks = []
    for num_images in counts:
        indices = torch.zeros(num_images, tokenizer.num_tokens, dtype=torch.int64)
        tokens = Tokens(indices=indices, codebook_size=tokenizer.codebook_size, layout=tokenizer.layout)
        decode = ImageDecoder(tokenizer, ImageStreams.from_seeds(range(num_images)))
        decode(tokens[:1], "pil")
        peaks.append(
            Peak(
                what="VQ-16",
                weights="bfloat16",
                image_size=image_size,
                num_images=num_images,
                weights_mib=stored_bytes(tokenizer) / MIB,
                cache_mib=0.0,
                working_mib=peak_memory(partial(decode, tokens, "pil"), device),
            )
        )
        sys.stderr.write(f"{peaks[-1]}\n")
    return peaks


def write_report(report: MemoryReport, folder: Path) -> None:
    """Write memory.json and report.md into an existing folder."""
    with atomic_path(folder / JSON_FILE) as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report), encoding="utf-8")


def _page(report: MemoryReport) -> str:
    counted = [
        "Generator",
        "Pixels",
        "Parameters, M",
        "Weights, MiB",
        "Weights with int8, MiB",
        "Cache per image, MiB",
    ]
    peaks = [
        "What",
        "Weights",
        "Pixels",
        "Images",
        "Weights, MiB",
        "Caches, MiB",
        "Working memory, MiB",
        "All, GiB",
    ]
    lines = [
        "# Memory of LlamaGen",
        "",
        *table(counted, map(_counted_cells, report.counted)),
        "",
        "One call:",
        "",
        *table(peaks, map(_peak_cells, [*report.drawing, *report.decoding]), num_labels=2),
        "",
        f"- Everything in {report.dtype}; int8: the linear layers of the blocks (`vistok/models/quantize.py`). "
        f"Guidance {report.guidance_scale:g}: two rows of the cache for each image, allocated once.",
        f"- Caches: of whole images, counted. Working memory: the measured peak beyond weights and caches while the first "
        f"{report.num_tokens} tokens are drawn, or while images are decoded: resident memory of the process beyond what was "
        "there before the call, on a GPU memory of tensors.",
        "- Images are decoded to pictures, in batches of the default size (`decode_options={'batch_size': ...}`).",
        "- Generator and tokenizer are not there at the same time with `enable_model_cpu_offload`; else their weights add up.",
        f"- Random weights. {report.machine}.",
    ]
    return "\n".join(lines) + "\n"


def _counted_cells(row: Counted) -> list[str]:
    weights = [f"{row.weights_mib[name]:.0f}" for name in ("bfloat16", "int8")]
    return [
        f"LlamaGen-{row.size}",
        str(row.image_size),
        f"{row.num_parameters / 1e6:.0f}",
        *weights,
        f"{row.cache_mib:.0f}",
    ]


def _peak_cells(peak: Peak) -> list[str]:
    total = peak.total_mib
    sizes = ["–", "–"] if total is None else [f"{peak.working_mib:.0f}", f"{total / 1024:.2f}"]
    return [
        peak.what,
        peak.weights,
        str(peak.image_size),
        str(peak.num_images),
        f"{peak.weights_mib:.0f}",
        f"{peak.cache_mib:.0f}",
        *sizes,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.memory", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--sizes", nargs="+", default=["B", "L", "XL", "XXL", "3B"], choices=PRESETS)
    parser.add_argument("--measure", default="XL", choices=PRESETS, help="the size of which images are drawn")
    parser.add_argument(
        "--image-size", type=int, default=256, choices=NUM_TOKENS, help="of images that are drawn"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-tokens", type=int, default=8, help="drawn of each image; more takes time")
    parser.add_argument(
        "--decode", type=int, nargs="+", default=[1, 8, 24], help="numbers of images that are decoded"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    report = MemoryReport(
        counted=[count(size, pixels) for size in options.sizes for pixels in NUM_TOKENS],
        decoding=decoding_peaks(options.image_size, options.decode, device),
        drawing=drawing_peaks(
            options.measure, options.image_size, options.batch_sizes, options.num_tokens, device
        ),
        guidance_scale=GUIDANCE_SCALE,
        num_tokens=options.num_tokens,
        dtype=str(DTYPE).removeprefix("torch."),
        machine=str(describe_machine()),
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
