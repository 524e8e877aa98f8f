"""How much memory drawing images with LlamaGen takes: `python -m vistok.eval.memory -o FOLDER`.

At released sizes with random weights, on which memory does not depend. Weights and caches are counted; peaks are measured
of whole images drawn with guidance, and of images decoded in batches by the tokenizer that goes with it. Writes
memory.json and report.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """A measured peak beyond the weights, in MiB; `None` where the system does not tell."""

    what: str
    weights: str
    image_size: int
    num_images: int
    weights_mib: float
    peak_mib: float | None


@dataclass(frozen=True)
class MemoryReport:
    """Everything, with the machine."""

    counted: list[Counted]
    drawing: list[Peak]
    decoding: list[Peak]
    guidance_scale: float
    dtype: str
    machine: str


def count(size: str, image_size: int) -> Counted:
    """The weights and the cache of one size; nothing is allocated."""
    with torch.device("meta"):
        model: Any = LlamaGenClass(**PRESETS[size], num_tokens=NUM_TOKENS[image_size]).to(DTYPE)
    cache = model.new_cache(2)
    layers = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    num_parameters = sum(weight.numel() for weight in model.parameters())
    stored = stored_bytes(model)
    layers_in_int8 = [model.get_submodule(name) for name in large_layers(model)]
    saved = sum(layer.weight.numel() - SCALE_BYTES * layer.out_features for layer in layers_in_int8)
    return Counted(
        size=size,
        image_size=image_size,
        num_parameters=num_parameters,
        weights_mib={"bfloat16": stored / MIB, "int8": (stored - saved) / MIB},
        cache_mib=sum(tensor.numel() * tensor.element_size() for tensor in layers) / MIB,
    )


def build(model_class: Any, device: torch.device, **config: Any) -> Any:
    """A model in `DTYPE` with random weights, in evaluation mode, that was never larger."""
    with torch.device("meta"):
        model = model_class(**config).to(DTYPE)
    model.to_empty(device=device)
    for weight in [*model.parameters(), *model.buffers()]:
        nn.init.normal_(weight, std=INIT_STD)
    return model.eval().requires_grad_(False)


def drawing_peaks(size: str, image_size: int, batch_sizes: Sequence[int], device: torch.device) -> list[Peak]:
    """Of whole images of one size, with weights in bfloat16 and in int8."""
    peaks = []
    for quantization in QUANTIZATIONS:
        model = build(LlamaGenClass, device, **PRESETS[size], num_tokens=NUM_TOKENS[image_size])
        if quantization is not None:
            quantize_weights(model, quantization)
        draw_images(model, 1, 2)  # what a first call costs once
        for num_images in batch_sizes:
            peak = peak_memory(lambda model=model, count=num_images: draw_images(model, count), device)  # type: ignore[misc]
            peaks.append(
                Peak(
                    what=f"LlamaGen-{size}",
                    weights=quantization or "bfloat16",
                    image_size=image_size,
                    num_images=num_images,
                    weights_mib=stored_bytes(model) / MIB,
                    peak_mib=peak,
                )
            )
            sys.stderr.write(f"{peaks[-1]}\n")
        del model
    return peaks


def draw_images(model: LlamaGenClass, num_images: int, num_tokens: int | None = None) -> Tokens:
    """Images of class 0 with guidance, all tokens of them by default."""
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
                peak_mib=peak_memory(lambda decode=decode, tokens=tokens: decode(tokens, "pil"), device),  # type: ignore[misc]
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
    counted = ["Generator", "Pixels", "Parameters, M", "Weights, MiB", "Weights with int8, MiB", "Cache per image, MiB"]
    peaks = ["What", "Weights", "Pixels", "Images", "Weights, MiB", "Peak beyond them, MiB", "Both, GiB"]
    lines = [
        "# Memory of LlamaGen",
        "",
        *table(counted, map(_counted_cells, report.counted)),
        "",
        "Measured, the peak of one call:",
        "",
        *table(peaks, map(_peak_cells, [*report.drawing, *report.decoding]), num_labels=2),
        "",
        f"- Everything in {report.dtype}; int8: the linear layers of the blocks (`vistok/models/quantize.py`). "
        f"Guidance {report.guidance_scale:g}: two rows of the cache for each image, allocated once.",
        "- Images are decoded to pictures, in batches of the default size (`decode_options={'batch_size': ...}`).",
        "- Generator and tokenizer are not there at the same time with `enable_model_cpu_offload`; else their weights add up.",
        "- Peaks: resident memory of the process beyond what was there before the call, on a GPU memory of tensors. "
        f"Random weights. {report.machine}.",
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
    sizes = ["–", "–"]
    if peak.peak_mib is not None:
        sizes = [f"{peak.peak_mib:.0f}", f"{(peak.weights_mib + peak.peak_mib) / 1024:.2f}"]
    return [
        peak.what,
        peak.weights,
        str(peak.image_size),
        str(peak.num_images),
        f"{peak.weights_mib:.0f}",
        *sizes,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m vistok.eval.memory", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--sizes", nargs="+", default=["B", "L", "XL", "XXL", "3B"], choices=PRESETS)
    parser.add_argument("--measure", default="XL", choices=PRESETS, help="the size of which images are drawn")
    parser.add_argument("--image-size", type=int, default=256, choices=NUM_TOKENS, help="of images that are drawn")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 8, 64], help="numbers of images that are decoded")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    report = MemoryReport(
        counted=[count(size, pixels) for size in options.sizes for pixels in NUM_TOKENS],
        decoding=decoding_peaks(options.image_size, options.decode, device),
        drawing=drawing_peaks(options.measure, options.image_size, options.batch_sizes, device),
        guidance_scale=GUIDANCE_SCALE,
        dtype=str(DTYPE).removeprefix("torch."),
        machine=str(describe_machine()),
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
