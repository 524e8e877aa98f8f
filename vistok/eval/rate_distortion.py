"""How good a picture is at how many bytes: learned tokenizers beside JPEG, WebP and AVIF.

All methods code the same uint8 images, so that one pixel is the same thing for each. A classical codec is swept over
its quality dial, a variable-length tokenizer over prefixes of its tokens. Two rates are told apart: the file as it would
lie on disk, headers included, and for tokens the payload alone, `ceil(tokens * log2(codebook_size) / 8)` bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import vistok
from vistok.codec.codec import ImageCodec
from vistok.eval.classical_codecs import ClassicalCodec
from vistok.eval.distances import Distance
from vistok.eval.image_sources import load_pictures
from vistok.eval.machine import describe_machine
from vistok.eval.reconstruction import psnr, ssim
from vistok.eval.sources import pixels, to_float, to_uint8
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import growing_prefixes


@dataclass(frozen=True)
class Coded:
    """A batch of images after one setting of a method."""

    value: int  # of the setting
    images: Tensor  # uint8 [b 3 H W]
    file_bytes: list[int]  # [b]
    payload_bytes: list[int] | None = None  # [b]; None where a file is not divided so


class Method(Protocol):
    """Something that codes images at several rates."""

    name: str
    setting: str  # what is swept: "quality" or "tokens"
    values: Sequence[int]
    description: str

    def code(self, images: Tensor) -> Iterator[Coded]:
        """uint8 `[b 3 H W]` once for each of `values`."""
        ...


class ClassicalMethod:
    """A file format, swept over its qualities."""

    setting = "quality"

    def __init__(self, codec: ClassicalCodec, qualities: Sequence[int] | None = None) -> None:
        self.codec = codec
        self.name = codec.name
        self.values = codec.qualities if qualities is None else qualities
        self.description = codec.describe()

    def code(self, images: Tensor) -> Iterator[Coded]:
        """See `Method`."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        for quality in self.values:
            files = [self.codec.compress(picture, quality) for picture in pictures]
            decoded = torch.stack([pixels(self.codec.decompress(file)) for file in files])
            yield Coded(quality, decoded, [len(file) for file in files])


class TokenizerMethod:
    """A tokenizer with a codebook, swept over prefixes of its tokens; one of fixed length has a single point.

    Args:
        name: what results call it; the files carry it too.
        tokenizer: any discrete tokenizer.
        num_tokens: lengths of the prefixes; by default 1, 2, 4, ... and all tokens.

    Raises:
        ValueError: continuous tokens, or a length that the tokenizer cannot decode.
    """

    setting = "tokens"

    def __init__(self, name: str, tokenizer: ImageTokenizer, num_tokens: Sequence[int] | None = None) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.codec = ImageCodec(tokenizer, model=name)
        self.bits_per_token = math.log2(self.codec.codebook_size)
        self.values: Sequence[int] = _prefixes(tokenizer, num_tokens)
        self.description = (
            f"{tokenizer.identity()}, {tokenizer.num_tokens} tokens of {self.bits_per_token:.2f} bits; "
            "the file is that of `vistok compress` with a uniform entropy model"
        )

    @torch.inference_mode()
    def code(self, images: Tensor) -> Iterator[Coded]:
        """See `Method`."""
        height, width = images.shape[2:]
        tokens = self.tokenizer.encode(to_float(images).to(self.tokenizer.device))
        for length in self.values:
            prefix = self.tokenizer.limit(tokens, length)
            files = [
                self.codec.pack(prefix[row : row + 1].to("cpu"), (width, height))
                for row in range(len(prefix))
            ]
            payload = [math.ceil(count * self.bits_per_token / 8) for count in prefix.token_counts.tolist()]
            yield Coded(length, to_uint8(self.tokenizer.decode(prefix)), [*map(len, files)], payload)


def _prefixes(tokenizer: ImageTokenizer, num_tokens: Sequence[int] | None) -> list[int]:
    longest = tokenizer.num_tokens
    if not tokenizer.variable_length:
        return [longest]
    if num_tokens is None:
        return growing_prefixes(longest)
    if not num_tokens or min(num_tokens) < 1 or max(num_tokens) > longest:
        raise ValueError(
            f"{type(tokenizer).__name__} decodes 1 to {longest} tokens, not {', '.join(map(str, num_tokens))}"
        )
    return sorted(set(num_tokens))


@dataclass(frozen=True)
class Point:
    """One setting of one method: means over the images."""

    method: str
    setting: str  # "quality" or "tokens"
    value: int
    file_bytes: float  # per image, headers included
    payload_bytes: float | None
    file_bytes_per_pixel: float
    payload_bytes_per_pixel: float | None
    psnr: float | None  # dB; None if an image came back exactly
    ssim: float
    distances: dict[str, float] = field(default_factory=dict)  # name -> distance, 0 if they look alike


@dataclass(frozen=True)
class RateDistortion:
    """Curves with their protocol."""

    points: list[Point]  # of one method after the other, each from small to large files
    methods: dict[str, str]  # name -> what it is
    distances: dict[str, str]  # name -> what it is
    unavailable: dict[str, str]  # distances that were wanted -> what is missing
    source: str
    num_images: int
    image_size: tuple[int, int]  # height and width
    rounding: str
    machine: str
    vistok: str


def measure_rate_distortion(
    source: Path | str,
    methods: Sequence[Method],
    distances: Sequence[Distance] = (),
    *,
    unavailable: dict[str, str] | None = None,
    image_size: int | None = None,
    num_images: int | None = None,
    batch_size: int = 16,
) -> RateDistortion:
    """Code all images with every setting of every method, and compare what comes back. Progress goes to stderr.

    Args:
        source, image_size, num_images: see `load_pictures`.
        methods: with different names.
        distances: perceptual ones, besides PSNR and SSIM.
        unavailable: recorded in the result.
        batch_size: images that are coded together.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: see `load_pictures`.
        ValueError: no methods, or two of one name.
    """
    names = [method.name for method in methods]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"give one or more methods with different names, got {', '.join(names) or 'none'}")
    images = load_pictures(Path(source), image_size=image_size, num_images=num_images)
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    num_settings = sum(len(method.values) for method in methods)
    with tqdm(total=num_settings * len(images), desc="rate-distortion", unit="image") as progress:
        for originals in images.split(batch_size):
            compare = Comparison(originals, distances)
            for method in methods:
                for coded in method.code(originals):
                    tallies[method.name, coded.value].add(coded, compare(coded.images))
                    progress.update(len(originals))
    height, width = images.shape[2:]
    return RateDistortion(
        points=[
            tallies[method.name, value].point(method, value, height * width)
            for method in methods
            for value in method.values
        ],
        methods={method.name: method.description for method in methods},
        distances={distance.name: distance.description for distance in distances},
        unavailable=dict(unavailable or {}),
        source=Path(source).resolve().name,
        num_images=len(images),
        image_size=(height, width),
        rounding="uint8, nearest; data range 255",
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )


class Comparison:
    """All measures of images against `originals`, uint8 `[b 3 H W]`."""

    def __init__(self, originals: Tensor, distances: Sequence[Distance]) -> None:
        self.originals = originals
        self.distances = {distance.name: distance.to(originals) for distance in distances}

    def __call__(self, images: Tensor) -> dict[str, list[float]]:
        """uint8 `[b 3 H W]` -> name of a measure -> its value for each image."""
        measures: dict[str, Any] = {
            "psnr": psnr(images, self.originals),
            "ssim": ssim(images, self.originals),
            **{name: measure(images) for name, measure in self.distances.items()},
        }
        return {name: values.tolist() for name, values in measures.items()}


class Tally:
    """Collects the images of one point, batch by batch."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = defaultdict(list)

    def add(self, coded: Coded, measures: dict[str, list[float]]) -> None:
        """Add a batch with its measures."""
        rates = {"file": coded.file_bytes, "payload": coded.payload_bytes or []}
        for columns in (measures, rates):
            for name, values in columns.items():
                self.columns[name].extend(values)

    def point(self, method: Method, value: int, num_pixels: int) -> Point:
        """Means over all images of `num_pixels` pixels."""
        means = {name: sum(values) / len(values) for name, values in self.columns.items() if values}
        file_bytes, payload_bytes = means.pop("file"), means.pop("payload", None)
        decibels = means.pop("psnr")
        return Point(
            method=method.name,
            setting=method.setting,
            value=value,
            file_bytes=file_bytes,
            payload_bytes=payload_bytes,
            file_bytes_per_pixel=file_bytes / num_pixels,
            payload_bytes_per_pixel=None if payload_bytes is None else payload_bytes / num_pixels,
            psnr=decibels if math.isfinite(decibels) else None,
            ssim=means.pop("ssim"),
            distances=means,
        )
