"""What stays of a picture while the rest is drawn: the options of `vistok generate` as arguments of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vistok.models.tokenizers.base import ImageTokenizer


def kept_tokens(
    tokenizer: ImageTokenizer, picture: Path | None, region: str | None, num_tokens: int | None
) -> dict[str, Any]:
    """`tokens` and `keep` for a pipeline; nothing when there is no `picture`.

    Args:
        tokenizer: encodes the picture, resized and centre-cropped to its size.
        picture: whose tokens stay.
        region: which, on a grid: `"top"`, `"bottom"`, `"left"`, `"right"` or `"LEFT,TOP,RIGHT,BOTTOM"` in shares of
            the width and height.
        num_tokens: which, in a sequence: the first so many.

    Raises:
        ValueError: a region or number without a picture, a picture without exactly one of them, one that is not
            possible, or a picture that cannot be read.
    """
    if picture is None:
        if region is not None or num_tokens is not None:
            raise ValueError(
                "--keep-region and --keep-tokens say what stays of a picture: add --keep-from PICTURE"
            )
        return {}
    if (region is None) == (num_tokens is None):
        raise ValueError(
            "--keep-from needs either --keep-region or --keep-tokens, to say what of the picture stays"
        )
    keep = _region(tokenizer, region) if region is not None else _first(tokenizer, num_tokens or 0)
    import torch

    from vistok.data.images import load_image

    image = load_image(picture, tokenizer.image_size, smallest=tokenizer.patch_size)
    with torch.inference_mode():
        tokens = tokenizer.encode(image[None].to(tokenizer.device))
    return {"tokens": tokens, "keep": keep}


def _region(tokenizer: ImageTokenizer, region: str) -> Tensor:
    from vistok.pipelines.inpainting import SIDES, region_mask

    try:
        left, top, right, bottom = SIDES.get(region) or map(float, region.split(","))
    except ValueError:
        raise ValueError(
            f"--keep-region must be {', '.join(SIDES)} or LEFT,TOP,RIGHT,BOTTOM between 0 and 1, got {region!r}"
        ) from None
    return region_mask(tokenizer.layout, left, top, right, bottom)


def _first(tokenizer: ImageTokenizer, num_tokens: int) -> Tensor:
    import torch

    if not 1 <= num_tokens < tokenizer.num_tokens:
        raise ValueError(f"--keep-tokens must be in 1..{tokenizer.num_tokens - 1}, got {num_tokens}")
    return torch.arange(tokenizer.num_tokens) < num_tokens
