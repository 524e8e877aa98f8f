"""What the first tokens of an emoji already show: PSNR and recognition against the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vistok.data.emoji import Emoji
from vistok.data.images import to_pil
from vistok.eval.emoji_set import BATCH_SIZE, RealSet, draw_names, first_by_name, read_images
from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import extract_features
from vistok.eval.neighbours import Share, nearest, share_of
from vistok.eval.pictures import grid
from vistok.eval.rate_distortion_report import check_plotting
from vistok.eval.reconstruction import psnr
from vistok.eval.sources import to_float, to_uint8
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import growing_prefixes


@dataclass(frozen=True)
class LengthPoint:
    """Reconstructions from the first `num_tokens` tokens."""

    num_tokens: int
    psnr: float  # dB, mean over the held-out emoji
    recognised: Share  # of the names drawn: the nearest real image has the right subcategory


@torch.inference_mode()
def length_curve(
    tokenizer: ImageTokenizer, reals: RealSet, names: Sequence[str], extractor: FeatureExtractor
) -> list[LengthPoint]:
    """One point for each power of two up to all tokens; a single one for a tokenizer of fixed length."""
    heldout = reals.images[[index for index, entry in enumerate(reals.emoji) if entry.split == "heldout"]]
    named = reals.images[[reals.by_name[name] for name in names]]
    wanted = [reals.named(name).subcategory for name in names]
    points = []
    prefixes = zip(
        prefix_lengths(tokenizer), _decodings(tokenizer, named), _decodings(tokenizer, heldout), strict=True
    )
    for num_tokens, rebuilt, rebuilt_heldout in prefixes:
        made = extract_features(rebuilt.split(BATCH_SIZE), extractor, name=f"{num_tokens} tokens")
        neighbours = nearest(made.features, reals.features.features).tolist()
        hits = [
            reals.emoji[index].subcategory == subcategory
            for index, subcategory in zip(neighbours, wanted, strict=True)
        ]
        value = psnr(rebuilt_heldout, heldout).mean().item()
        points.append(LengthPoint(num_tokens, value, share_of(hits)))
    return points


def prefix_lengths(tokenizer: ImageTokenizer) -> list[int]:
    """Lengths to show: growing ones, or the only one of a tokenizer of fixed length."""
    most = tokenizer.num_tokens
    return growing_prefixes(most) if tokenizer.variable_length else [most]


def _decodings(tokenizer: ImageTokenizer, images: Tensor) -> Iterator[Tensor]:
    """uint8 `[n 3 H W]` -> reconstructions from each of `prefix_lengths`, uint8 `[n 3 H W]`; encoded once."""
    tokens = [tokenizer.encode(to_float(batch).to(tokenizer.device)) for batch in images.split(BATCH_SIZE)]
    for num_tokens in prefix_lengths(tokenizer):
        yield torch.cat([to_uint8(tokenizer.decode(batch.keep(num_tokens))) for batch in tokens])


@torch.inference_mode()
def length_strip(
    tokenizer: ImageTokenizer, folder: Path, emoji: Sequence[Emoji], *, rows: int = 5, seed: int = 0
) -> Image.Image:
    """Held-out emoji drawn at random, each reconstructed from 1, 2, 4, ... tokens, the original last."""
    named = {name: emoji[index] for name, index in first_by_name(emoji).items()}
    heldout = [name for name, entry in named.items() if entry.split == "heldout"]
    names = draw_names(heldout, min(rows, len(heldout)), seed)
    images = to_float(read_images(folder, [named[name] for name in names], tokenizer.image_size))
    tokens = tokenizer.encode(images.to(tokenizer.device))
    lengths = prefix_lengths(tokenizer)
    columns = [tokenizer.decode(tokens.keep(length)).float().cpu() for length in lengths] + [images]
    pictures = [column[row : row + 1] for row in range(len(names)) for column in columns]
    labels = [_count(length) for length in lengths] + ["original"]
    return grid(to_pil(torch.cat(pictures)), labels * len(names), columns=len(columns))


def _count(length: int) -> str:
    return "1 token" if length == 1 else f"{length} tokens"


def plot_lengths(points: Sequence[LengthPoint], path: Path) -> None:
    """PSNR and recognition against the number of tokens, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    other = axes.twinx()
    lengths = [point.num_tokens for point in points]
    shares = [100 * (point.recognised.share or 0.0) for point in points]
    lines = [
        *axes.plot(lengths, [point.psnr for point in points], "o-", color="tab:blue", label="held-out PSNR"),
        *other.plot(lengths, shares, "s--", color="tab:orange", label="recognised"),
    ]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("tokens per image")
    axes.set_ylabel("PSNR, dB")
    other.set_ylabel("recognised, %")
    other.set_ylim(0, 100)
    axes.legend(handles=lines, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
