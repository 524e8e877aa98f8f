"""Options that say how many tokens each picture gets."""

from __future__ import annotations

from typing import Annotated

import typer

NumTokens = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]",
        help="Keep the first N tokens, where the tokenizer allows it; or a number for each picture, in order.",
    ),
]
TargetPsnr = Annotated[
    float | None, typer.Option(metavar="DB", help="As few tokens as give each picture this PSNR.")
]
MaxTokens = Annotated[int | None, typer.Option(help="No picture gets more tokens than this.")]


def parse_num_tokens(text: str | None) -> int | list[int] | None:
    """`--num-tokens` as `ImageTokenizer.encode` takes it: "64" -> 64, "8,16" -> [8, 16].

    Raises:
        ValueError: not integers.
    """
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--num-tokens is a number, or one for each picture such as 8,16,32; got {text!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]
