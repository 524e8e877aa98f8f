"""`vistok detect`: whether images carry the watermark of a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.options import DEFAULT_MODEL, BatchSize, Device, Dtype, Model, choose_device, choose_dtype
from vistok.cli.output import report
from vistok.cli.tokenize import TOKEN_SUFFIXES

if TYPE_CHECKING:
    from vistok.decoding.watermark import Watermark, WatermarkKey
    from vistok.tokens import Tokens


def detect(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Pictures, folders of them, or files of `vistok tokenize`."),
    ],
    key: Annotated[str, typer.Option(help="The text that `vistok generate --watermark` was given.")],
    model: Model = DEFAULT_MODEL,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens the pictures were drawn with. [default: all]")
    ] = None,
    false_positive_rate: Annotated[
        float, typer.Option(help="The share of unmarked pictures that may be called marked, in (0, 1).")
    ] = 0.01,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Say which images carry the watermark of a key.

    Pictures are encoded again, which gives back only a part of the tokens they were drawn from; with few tokens per image
    a mark is seldom found. Files of tokens keep all of it.
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"the false-positive rate must be between 0 and 1, got {false_positive_rate}")
    from vistok.data.images import image_files
    from vistok.data.token_file import load_tokens
    from vistok.decoding.watermark import detect as detect_in
    from vistok.hub import load_tokenizer
    from vistok.pipelines.tokenization import encode_files

    def batches() -> Iterator[tuple[list[str], Tokens]]:
        pictures = []
        for source in sources:
            if source.suffix.lower() in TOKEN_SUFFIXES:
                content = load_tokens(source)
                yield content.sources, content.tokens
            else:
                pictures += image_files(source)
        if pictures:
            tokenizer = load_tokenizer(model, device=choose_device(device), dtype=choose_dtype(dtype))
            make_key(key, tokenizer.codebook_size)  # refuses a wrong key or tokenizer before the work
            tokens = encode_files(tokenizer, pictures, num_tokens=num_tokens, batch_size=batch_size)
            yield [str(file) for file in pictures], tokens

    images: list[dict[str, Any]] = []
    for names, tokens in batches():
        found = detect_in(tokens, make_key(key, tokens.codebook_size))
        for name, count, detection in zip(names, tokens.token_counts.tolist(), found, strict=True):
            images.append(
                {
                    "source": name,
                    "num_tokens": count,
                    "z_score": round(detection.z_score, 3),
                    "p_value": float(f"{detection.p_value:.4g}"),
                    "list": detection.list_number,
                    "is_marked": detection.is_marked(false_positive_rate),
                }
            )
    report(
        "detect",
        model=model,
        num_images=len(images),
        num_marked=sum(image["is_marked"] for image in images),
        false_positive_rate=false_positive_rate,
        images=images,
    )


def make_key(text: str, codebook_size: int | None) -> WatermarkKey:
    """The key of a tokenizer's codes.

    Raises:
        ValueError: a continuous tokenizer, which has none, or an empty text.
    """
    from vistok.decoding.watermark import WatermarkKey

    if codebook_size is None:
        raise ValueError("a watermark is in the choice of codes; this model's tokens are continuous")
    return WatermarkKey(text, codebook_size)


def make_watermark(
    key: str | None, strength: float | None, codebook_size: int | None, seeds: list[int]
) -> Watermark | None:
    """What `vistok generate --watermark KEY --watermark-strength` marks images with, one seed for each.

    Raises:
        ValueError: see `make_key` and `Watermark`; or a strength without a key.
    """
    from vistok.decoding.watermark import STRENGTH, Watermark

    if key is None:
        if strength is not None:
            raise ValueError("--watermark-strength needs --watermark KEY")
        return None
    return Watermark.for_seeds(
        make_key(key, codebook_size), seeds, STRENGTH if strength is None else strength
    )
