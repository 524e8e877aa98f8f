"""`vistok tokenize` and `vistok detokenize`: pictures to a file of tokens, and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistok.cli.lengths import MaxTokens, NumTokens, TargetPsnr, parse_num_tokens
from vistok.cli.options import (
    DEFAULT_MODEL,
    BatchSize,
    Device,
    Dtype,
    Model,
    Output,
    choose_device,
    choose_dtype,
)
from vistok.cli.output import PictureOutput, check_file, report

if TYPE_CHECKING:
    import torch

    from vistok.models.tokenizers.base import ImageTokenizer

TOKEN_SUFFIXES = (".safetensors",)


def tokenize(
    source: Annotated[
        Path, typer.Argument(metavar="IMAGE_OR_FOLDER", help="A picture, or a folder of pictures.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The file of tokens, ending in .safetensors."),
    ],
    model: Model = DEFAULT_MODEL,
    num_tokens: NumTokens = None,
    target_psnr: TargetPsnr = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Turn pictures into tokens."""
    check_file(output, TOKEN_SUFFIXES)
    lengths = parse_num_tokens(num_tokens)
    from vistok.data.images import image_files
    from vistok.data.token_file import TokenFile, save_tokens
    from vistok.hub import load_tokenizer
    from vistok.pipelines.tokenization import encode_files

    files, place, kind = image_files(source), choose_device(device), choose_dtype(dtype)
    tokenizer = load_tokenizer(model)
    identity = tokenizer.identity()  # of the weights as they are stored, before they are rounded to `dtype`
    _move(tokenizer, place, kind)
    started = time.perf_counter()
    tokens = encode_files(
        tokenizer,
        files,
        num_tokens=lengths,
        target_psnr=target_psnr,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    seconds = time.perf_counter() - started
    root = source if source.is_dir() else source.parent
    names = [file.relative_to(root).as_posix() for file in files]
    save_tokens(output, TokenFile(tokens, names, tokenizer=identity, model=model))
    total = int(tokens.token_counts.sum())
    report(
        "tokenize",
        model=model,
        tokenizer=identity,
        num_images=len(tokens),
        num_tokens=total,
        device=place,
        dtype=dtype,
        seconds=round(seconds, 3),
        tokens_per_second=round(total / seconds, 1),
        output=str(output),
    )


def detokenize(
    source: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file that `vistok tokenize` wrote.")],
    output: Output,
    model: Annotated[
        str | None, typer.Option(help="The tokenizer. [default: the one named in the file]", metavar="NAME")
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Turn tokens back into pictures; they must be those of the tokenizer."""
    target = PictureOutput.parse(output)
    from vistok.data.images import to_pil
    from vistok.data.token_file import load_tokens
    from vistok.hub import load_tokenizer
    from vistok.pipelines.tokenization import decode_tokens

    content, place, kind = load_tokens(source), choose_device(device), choose_dtype(dtype)
    name = model or content.model
    tokenizer = load_tokenizer(name)
    content.check_maker(tokenizer.identity())
    _move(tokenizer, place, kind)
    started = time.perf_counter()
    images = decode_tokens(tokenizer, content.tokens, batch_size=batch_size)
    seconds = time.perf_counter() - started
    target.save(to_pil(images), [Path(label).stem for label in content.sources])
    total = int(content.tokens.token_counts.sum())
    report(
        "detokenize",
        model=name,
        tokenizer=content.tokenizer,
        num_images=len(images),
        num_tokens=total,
        device=place,
        dtype=dtype,
        seconds=round(seconds, 3),
        tokens_per_second=round(total / seconds, 1),
        output=output,
    )


def _move(tokenizer: ImageTokenizer, device: str, dtype: torch.dtype) -> None:
    tokenizer.to(device)
    if tokenizer.dtype != dtype:  # diffusers warns of every change of type, even of none
        tokenizer.to(dtype=dtype)
