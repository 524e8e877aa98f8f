"""Many pictures through a tokenizer, in batches: files -> tokens, tokens -> images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vistok.data.images import load_image
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens, concatenate


@torch.inference_mode()
def encode_files(
    tokenizer: ImageTokenizer,
    files: Sequence[Path],
    *,
    num_tokens: int | Sequence[int] | None = None,
    target_psnr: float | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
) -> Tokens:
    """Tokens of picture files, resized and centre-cropped to the tokenizer's size, on the CPU; shows progress.

    Args:
        tokenizer: what encodes them.
        files: the pictures.
        num_tokens: how many tokens to keep of every picture, or of each.
        target_psnr, max_tokens: see `ImageTokenizer.encode`.
        batch_size: pictures at a time.

    Raises:
        ValueError: no files; one is not an image, damaged, or smaller than a patch; a length is out of range, or there
            is not one for each file.
    """
    if isinstance(num_tokens, Sequence) and len(num_tokens) != len(files):
        raise ValueError(
            f"{len(num_tokens)} numbers of tokens for {len(files)} pictures; give one, or one for each"
        )
    batches = []
    for part in _parts(len(files), batch_size, "encode"):
        images = torch.stack(
            [load_image(path, tokenizer.image_size, smallest=tokenizer.patch_size) for path in files[part]]
        )
        tokens = tokenizer.encode(
            images.to(tokenizer.device),
            num_tokens[part] if isinstance(num_tokens, Sequence) else num_tokens,
            target_psnr=target_psnr,
            max_tokens=max_tokens,
        )
        batches.append(tokens.to("cpu"))
    return concatenate(batches)


@torch.inference_mode()
def decode_tokens(tokenizer: ImageTokenizer, tokens: Tokens, *, batch_size: int = 16) -> Tensor:
    """Images `[b 3 H W]` float32 in [-1, 1] of any number of tokens, on the CPU; shows progress.

    Raises:
        ValueError: there are none, or they are another tokenizer's.
    """
    if not len(tokens):
        raise ValueError("there are no tokens to decode")
    batches = [
        tokenizer.decode(tokens[part].to(tokenizer.device)).float().cpu()
        for part in _parts(len(tokens), batch_size, "decode")
    ]
    return torch.cat(batches)


def _parts(total: int, batch_size: int, description: str) -> Iterator[slice]:
    starts = tqdm(range(0, total, batch_size), desc=description, unit="batch")
    return (slice(start, start + batch_size) for start in starts)
