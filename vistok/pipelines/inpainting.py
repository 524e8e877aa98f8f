"""Inpainting and outpainting: the tokens of a picture of which some stay, and which those are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.decoding.given import Given
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Layout, Tokens

SIDES = {  # left, top, right, bottom, as shares of the width and height
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
}


def given_tokens(
    tokenizer: ImageTokenizer, tokens: Tokens | None, keep: Tensor | None, batch_size: int
) -> Given | None:
    """What stays of `tokens` in a batch of images, on the CPU; `None` when neither is given.

    Args:
        tokenizer: whose tokens they are.
        tokens: of one image, for all images of the batch, or of one image each; of a variable-length tokenizer also
            fewer than all.
        keep: boolean, `True` where a token stays: `[n]`, on a grid also `[h w]`, or `[b n]`.
        batch_size: images of the batch.

    Raises:
        ValueError: only one of the two, tokens of another tokenizer or of another number of images, a mask of another
            shape or dtype, or one that keeps a token that is not there.
    """
    if tokens is None and keep is None:
        return None
    if tokens is None or keep is None:
        raise ValueError("tokens and keep go together: the tokens of a picture, and which of them stay")
    tokenizer.check_tokens(tokens)
    if len(tokens) not in (1, batch_size):
        raise ValueError(
            f"tokens of {len(tokens)} images for {batch_size}; give those of one image, or of one for each"
        )
    tokens, num_tokens = tokens.to("cpu"), tokenizer.num_tokens
    missing = num_tokens - tokens.data.shape[1]
    indices = F.pad(tokens.data, (0, missing)).expand(batch_size, -1)  # [b n]
    is_token = F.pad(tokens.is_token, (0, missing)).expand(batch_size, -1)
    mask = keep_mask(keep, batch_size, num_tokens, tokenizer.layout)
    if bool((absent := mask & ~is_token).any()):
        row, position = absent.nonzero()[0].tolist()
        raise ValueError(
            f"keep marks token {position} of image {row}, of which only {int(is_token[row].sum())} tokens are given"
        )
    return Given(indices, mask)


def keep_mask(keep: Tensor, batch_size: int, num_tokens: int, layout: Layout) -> Tensor:
    """`keep`, as `given_tokens` takes it, as `[b n]` on the CPU.

    Raises:
        ValueError: another shape or dtype.
    """
    possible = {(num_tokens,), (batch_size, num_tokens), (1, num_tokens)}
    if layout.grid is not None:
        possible.add(layout.grid)
    shape = tuple(keep.shape)
    if keep.dtype != torch.bool or shape not in possible:
        grid = "" if layout.grid is None else f", {list(layout.grid)}"
        raise ValueError(
            f"keep must be boolean, True where a token stays, of shape [{num_tokens}]{grid} or "
            f"[{batch_size} {num_tokens}]; got {keep.dtype} {list(shape)}"
        )
    rows = keep.cpu() if shape[1:] == (num_tokens,) else keep.cpu().reshape(1, num_tokens)
    return rows.expand(batch_size, -1)


def region_mask(layout: Layout, left: float, top: float, right: float, bottom: float) -> Tensor:
    """The tokens of a grid whose centres lie in a rectangle, `[h w]` boolean; see also `SIDES`.

    Args:
        layout: of the tokens; a grid of two axes.
        left, top, right, bottom: of the rectangle, as shares of the width and height in [0, 1].

    Raises:
        ValueError: no such grid, a rectangle outside [0, 1], or one without any token in it.
    """
    if layout.grid is None or len(layout.grid) != 2:
        raise ValueError(
            f"a region needs tokens on a grid of rows and columns, and these are a {layout}: say how many tokens stay"
        )
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            "a region is left, top, right, bottom with 0 <= left < right <= 1 and 0 <= top < bottom <= 1, "
            f"got {left:g}, {top:g}, {right:g}, {bottom:g}"
        )
    y, x = ((torch.arange(size) + 0.5) / size for size in layout.grid)
    mask = ((top < y) & (y < bottom))[:, None] & ((left < x) & (x < right))[None, :]
    if not bool(mask.any()):
        raise ValueError(f"the region is smaller than one of the {layout} tokens")
    return mask
