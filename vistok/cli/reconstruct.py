"""`vistok reconstruct`: pictures beside what their tokens give back."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.lengths import MaxTokens, NumTokens, TargetPsnr, parse_num_tokens
from vistok.cli.options import DEFAULT_MODEL, BatchSize, Device, Dtype, Model, choose_device, choose_dtype
from vistok.cli.output import PICTURE_SUFFIXES, check_file, report


def reconstruct(
    sources: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, or folders of pictures.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The picture of all pairs, such as strip.png."),
    ],
    model: Model = DEFAULT_MODEL,
    num_tokens: NumTokens = None,
    target_psnr: TargetPsnr = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Show originals beside their reconstructions, with the PSNR of each."""
    check_file(output, PICTURE_SUFFIXES)
    lengths = parse_num_tokens(num_tokens)
    import torch

    from vistok.data.images import image_files, open_rgb, resize_and_crop, to_pil
    from vistok.eval.pictures import reconstruction_strip
    from vistok.eval.reconstruction import psnr
    from vistok.eval.sources import pixels
    from vistok.files import atomic_path
    from vistok.hub import load_tokenizer
    from vistok.pipelines.tokenization import decode_tokens, encode_files

    files = [file for source in sources for file in image_files(source)]
    tokenizer = load_tokenizer(model, device=choose_device(device), dtype=choose_dtype(dtype))
    started = time.perf_counter()
    tokens = encode_files(
        tokenizer,
        files,
        num_tokens=lengths,
        target_psnr=target_psnr,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    images = decode_tokens(tokenizer, tokens, batch_size=batch_size)
    seconds = time.perf_counter() - started
    originals = [resize_and_crop(open_rgb(file), tokenizer.image_size) for file in files]
    reconstructions = to_pil(images)
    with atomic_path(output) as partial:
        reconstruction_strip(originals, reconstructions, [file.stem for file in files]).save(partial)
    values = psnr(
        *(torch.stack([*map(pixels, pictures)]) for pictures in (reconstructions, originals))
    ).tolist()
    total = int(tokens.token_counts.sum())
    report(
        "reconstruct",
        model=model,
        num_images=len(files),
        num_tokens=total,
        lengths=tokens.token_counts.tolist(),
        psnr=[decibels(value) for value in values],
        mean_psnr=decibels(sum(values) / len(values)),
        rounding="uint8, nearest; data range 255",
        device=str(tokenizer.device),
        dtype=dtype,
        seconds=round(seconds, 3),
        tokens_per_second=round(total / seconds, 1),
        output=str(output),
    )


def decibels(value: float) -> float | None:
    """`None` for an exact reconstruction, whose PSNR is infinite."""
    return round(value, 3) if math.isfinite(value) else None
