"""What a watermark costs and how often it is found: `python -m vistok.eval.watermark --data data/emoji -o FOLDER`.

Draws the same images at several strengths of the watermark and looks for it in the tokens, and in the pictures as they
would be saved, encoded again. Every batch of images has a key of its own, so that rates are over keys and images. Writes
watermark.json, watermark.png and report.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.data.emoji import Emoji, read_index
from vistok.data.images import to_pil
from vistok.decoding.watermark import Watermark, WatermarkKey, detect
from vistok.eval.classical_codecs import load_codec
from vistok.eval.emoji_measures import recognise
from vistok.eval.emoji_set import RealSet, draw_names, first_by_name
from vistok.eval.features import FeatureExtractor, load_extractor
from vistok.eval.fid import extract_features
from vistok.eval.machine import describe_machine
from vistok.eval.neighbours import Share
from vistok.eval.rate_distortion_report import check_plotting
from vistok.eval.sources import pixels, to_float, to_uint8
from vistok.tokens import Tokens, concatenate

EXTRACTOR = "efficientnet-lite0"
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
BATCH_SIZE = 25  # images that share a key
NUM_NULL_KEYS = 100  # against which unmarked images are tested
FALSE_POSITIVE_RATE = 0.01
FILES = {"PNG": None, "JPEG 90": 90, "JPEG 75": 75}  # name -> quality


@dataclass(frozen=True)
class StrengthPoint:
    """What one strength of the watermark does."""

    strength: float
    detected: dict[
        str, float
    ]  # where the tokens come from -> share of images found at the false-positive rate
    z_score: dict[str, float]  # likewise, mean
    changed_tokens: float  # share that differs from the image without watermark and of the same seed
    psnr: (
        float | None
    )  # dB against that image, of the mean squared error over all images; None if all are equal
    recognised: Share  # nearest real image is of the subcategory that was asked for


@dataclass(frozen=True)
class FalsePositives:
    """Share of unmarked images that are called marked, for one key after the other."""

    images: str
    num_images: int
    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class WatermarkReport:
    """Everything measured, with its protocol."""

    model: str
    points: list[StrengthPoint]
    false_positives: list[FalsePositives]
    kept_tokens: dict[
        str, float
    ]  # without watermark: how saved -> share of the tokens that is as it was drawn
    num_images: int
    num_tokens: int
    num_lists: int
    green_fraction: float
    batch_size: int
    num_null_keys: int
    false_positive_rate: float
    sampling: dict[str, Any]
    machine: str
    vistok: str


def saved(images: Tensor, quality: int | None) -> Tensor:
    """Pictures uint8 `[b 3 H W]` -> what a JPEG file of that quality gives back; `None` is lossless, as PNG."""
    if quality is None:
        return images
    codec = load_codec("jpeg")
    files = [codec.compress(picture, quality) for picture in to_pil(to_float(images))]
    return torch.stack([pixels(codec.decompress(file)) for file in files])


class MarkedImages:
    """Draws the same images with and without a watermark.

    Args:
        pipeline: a `TextToImagePipeline`; image i is drawn from text i with seed i.
        prompts: the texts.
        num_lists, green_fraction: of the keys.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[str], num_lists: int, green_fraction: float) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.pool = (num_lists, green_fraction)

    def key(self, text: str) -> WatermarkKey:
        """A key for this pipeline's tokens."""
        return WatermarkKey(text, self.pipeline.tokenizer.codebook_size, *self.pool)

    def batches(self) -> Iterator[tuple[WatermarkKey, range]]:
        """A key, and the images that it marks."""
        for start in range(0, len(self.prompts), BATCH_SIZE):
            images = range(start, min(start + BATCH_SIZE, len(self.prompts)))
            yield self.key(f"key {start // BATCH_SIZE}"), images

    def draw(self, strength: float) -> Tokens:
        """All images, marked."""
        drawn = []
        for key, images in self.batches():
            prompts, seeds = [self.prompts[i] for i in images], list(images)
            mark = Watermark.for_seeds(key, seeds, strength)
            output = self.pipeline(prompts, seed=seeds, logits_processor=mark, output_type="tokens")
            drawn.append(output.images)
        return concatenate(drawn)

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        """Pictures uint8 `[n 3 H W]`."""
        tokenizer = self.pipeline.tokenizer
        return torch.cat([to_uint8(tokenizer.decode(part)) for part in split(tokens)])

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tokens:
        """Tokens of pictures uint8 `[n 3 H W]`."""
        tokenizer = self.pipeline.tokenizer
        return concatenate(
            [tokenizer.encode(to_float(part).to(tokenizer.device)) for part in images.split(BATCH_SIZE)]
        )

    def find(self, tokens: Tokens, false_positive_rate: float) -> tuple[float, float]:
        """The share of all images found with the keys that marked them, and the mean z-score."""
        found = [
            image
            for key, images in self.batches()
            for image in detect(tokens[images[0] : images[-1] + 1], key)
        ]
        hits = sum(image.is_marked(false_positive_rate) for image in found)
        return hits / len(found), sum(image.z_score for image in found) / len(found)

    def false_positives(self, name: str, tokens: Tokens, false_positive_rate: float) -> FalsePositives:
        """Of unmarked images, for NUM_NULL_KEYS keys that have nothing to do with them."""
        shares = []
        for number in range(NUM_NULL_KEYS):
            found = detect(tokens, self.key(f"null key {number}"))
            shares.append(sum(image.is_marked(false_positive_rate) for image in found) / len(found))
        return FalsePositives(name, len(tokens), sum(shares) / len(shares), min(shares), max(shares))


def split(tokens: Tokens) -> Iterator[Tokens]:
    """Batches of BATCH_SIZE images."""
    return (tokens[start : start + BATCH_SIZE] for start in range(0, len(tokens), BATCH_SIZE))


def evaluate_watermark(
    pipeline: Any,
    reals: RealSet,
    extractor: FeatureExtractor,
    *,
    model: str,
    strengths: Sequence[float] = STRENGTHS,
    num_lists: int,
    green_fraction: float,
) -> WatermarkReport:
    """Draw and look for marks at every strength.

    Args:
        pipeline: a `TextToImagePipeline`.
        reals: one image for each name to draw: to recognise the drawn ones by, and to find no marks in.
        extractor: the one that `reals` was read with.
        model: the pipeline's name, for the report.
        strengths: of the watermark, added to the logits of green codes.
        num_lists, green_fraction: of the keys.
    """
    names = list(reals.by_name)
    marked = MarkedImages(pipeline, names, num_lists, green_fraction)
    plain = marked.draw(0.0)
    plain_images = marked.decode(plain)
    plain_again = {name: marked.encode(saved(plain_images, quality)) for name, quality in FILES.items()}
    points = []
    for strength in strengths:
        point = _measure(marked, strength, plain, plain_images, reals, extractor)
        sys.stderr.write(f"{point}\n")
        points.append(point)
    unmarked = {"drawn, tokens": plain, "drawn, PNG": plain_again["PNG"], "real": marked.encode(reals.images)}
    return WatermarkReport(
        model=model,
        points=points,
        false_positives=[
            marked.false_positives(name, tokens, FALSE_POSITIVE_RATE) for name, tokens in unmarked.items()
        ],
        kept_tokens={
            name: (tokens.data == plain.data).float().mean().item() for name, tokens in plain_again.items()
        },
        num_images=len(names),
        num_tokens=plain.data.shape[1],
        num_lists=num_lists,
        green_fraction=green_fraction,
        batch_size=BATCH_SIZE,
        num_null_keys=NUM_NULL_KEYS,
        false_positive_rate=FALSE_POSITIVE_RATE,
        sampling=pipeline.sampling_settings(),
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )


def _measure(
    marked: MarkedImages,
    strength: float,
    plain: Tokens,
    plain_images: Tensor,
    reals: RealSet,
    extractor: FeatureExtractor,
) -> StrengthPoint:
    tokens = marked.draw(strength)
    images = marked.decode(tokens)
    sources = {"tokens": tokens}
    sources |= {name: marked.encode(saved(images, quality)) for name, quality in FILES.items()}
    found = {name: marked.find(source, FALSE_POSITIVE_RATE) for name, source in sources.items()}
    error = (images.float() - plain_images.float()).square().mean().item()
    features = extract_features(images.split(BATCH_SIZE), extractor, name=f"strength {strength}")
    return StrengthPoint(
        strength=strength,
        detected={name: share for name, (share, _) in found.items()},
        z_score={name: z_score for name, (_, z_score) in found.items()},
        changed_tokens=(tokens.data != plain.data).float().mean().item(),
        psnr=10 * math.log10(255**2 / error) if error else None,
        recognised=recognise(marked.prompts, features.features, reals).every,
    )


def drawn_emoji(folder: Path, num_images: int, text_length: int, seed: int = 0) -> list[Emoji]:
    """Emoji of different names that a generator of `text_length` bytes can read, drawn at random.

    Raises:
        FileNotFoundError: no built set in `folder`.
        ValueError: it has fewer.
    """
    emoji = read_index(folder)
    by_name = first_by_name(emoji)
    readable = [name for name in by_name if len(name.encode()) <= text_length]
    return [emoji[by_name[name]] for name in draw_names(readable, num_images, seed)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    from vistok.decoding.watermark import GREEN_FRACTION, NUM_LISTS
    from vistok.eval.watermark_report import write_report

    parser = argparse.ArgumentParser(prog="python -m vistok.eval.watermark", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--data", type=Path, required=True, help="folder built by vistok.data.emoji")
    parser.add_argument("--model", default="emoji-64", help="name or folder of a text-to-image pipeline")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--num-lists", type=int, default=NUM_LISTS)
    parser.add_argument("--green-fraction", type=float, default=GREEN_FRACTION)
    options = parser.parse_args(arguments)
    check_plotting()
    options.out.mkdir(parents=True, exist_ok=True)
    pipeline = vistok.load(options.model)
    pipeline.set_progress_bar_config(disable=True)
    extractor = load_extractor(EXTRACTOR)
    emoji = drawn_emoji(options.data, options.num_images, pipeline.transformer.text_length)
    reals = RealSet.read(options.data, pipeline.tokenizer.image_size, extractor, emoji)
    report = evaluate_watermark(
        pipeline,
        reals,
        extractor,
        model=Path(options.model).name,
        strengths=options.strengths,
        num_lists=options.num_lists,
        green_fraction=options.green_fraction,
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
