"""How good and how fast a class-conditional generator is: Fréchet distance, steps and seconds per image, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import FeatureSet, compare_features, extract_features
from vistok.eval.sources import to_uint8
from vistok.eval.timing import median_seconds
from vistok.models.generators.base import MaskedGenerator
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens


@dataclass(frozen=True)
class Sampling:
    """How a generator is sampled, besides guidance: an ordered one from its own distribution, a masked one so.

    Args:
        num_steps, choice_temperature: of a masked generator, see `MaskedSamplingParams`.
    """

    num_steps: int | None = None
    choice_temperature: float | None = None

    def masked(self) -> MaskedSamplingParams:
        """Those of a masked generator, what is not named by default."""
        given = {"num_steps": self.num_steps, "choice_temperature": self.choice_temperature}
        return MaskedSamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def steps(self, model: Any) -> int:
        """Forward steps per image."""
        return self.masked().num_steps if isinstance(model, MaskedGenerator) else model.order.num_steps

    def __str__(self) -> str:
        named = {"steps": self.num_steps, "choice temperature": self.choice_temperature}
        return ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None)


@dataclass(frozen=True)
class Point:
    """Quality with one way of sampling."""

    sampling: Sampling
    guidance_scale: float
    frechet_distance: float
    kernel_distance: float | None  # None with fewer than 100 images


@dataclass(frozen=True)
class Row:
    """One generator, sampled in one way."""

    name: str
    model_class: str
    sampling: str  # what is not the default; may be empty
    order: str
    num_parameters: int
    num_steps: int  # forward steps per image
    losses: dict[str, float]  # held-out, see the training task
    points: list[Point]  # quality at every guidance scale
    seconds: dict[int, float]  # batch size -> seconds per image

    @property
    def title(self) -> str:
        """What pictures and tables call it."""
        return f"{self.name}, {self.sampling}" if self.sampling else self.name

    @property
    def best(self) -> Point:
        """The point of the smallest distance."""
        return min(self.points, key=lambda point: point.frechet_distance)


@torch.inference_mode()
def draw_tokens(
    model: Any, labels: Tensor, seeds: Sequence[int], sampling: Sampling, guidance_scale: float
) -> Tokens:
    """Tokens of one image per label `[b]` and seed."""
    streams, guidance = ImageStreams.from_seeds(seeds), ConstantGuidance(guidance_scale)
    if not isinstance(model, MaskedGenerator):
        return generate_ordered(model, labels, streams=streams, guidance=guidance)
    indices = generate_masked(model, labels, streams=streams, sampling=sampling.masked(), guidance=guidance)
    return Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout)


def draw_images(
    model: Any,
    tokenizer: ImageTokenizer,
    labels: Tensor,
    sampling: Sampling,
    guidance_scale: float,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Batches uint8 `[b 3 H W]` of one image per label `[n]`; image i has the seed i."""
    for start in range(0, len(labels), batch_size):
        few = labels[start : start + batch_size]
        tokens = draw_tokens(model, few, range(start, start + len(few)), sampling, guidance_scale)
        yield decode(tokenizer, tokens.data)


@torch.inference_mode()
def decode(tokenizer: ImageTokenizer, indices: Tensor) -> Tensor:
    """Images uint8 `[b 3 H W]` of `indices [b n]`."""
    tokens = Tokens(indices=indices, codebook_size=tokenizer.codebook_size, layout=tokenizer.layout)
    return to_uint8(tokenizer.decode(tokens))


def balanced_labels(num_images: int, num_classes: int) -> Tensor:
    """`[n]`: every class in turn."""
    return torch.arange(num_images) % num_classes


def measure_quality(
    model: Any,
    tokenizer: ImageTokenizer,
    real: FeatureSet,
    *,
    extractor: FeatureExtractor,
    sampling: Sampling,
    guidance_scale: float,
    num_samples: int,
) -> Point:
    """Distance of samples, equally many of each class, from `real` images."""
    labels = balanced_labels(num_samples, model.num_classes)
    batches = draw_images(model, tokenizer, labels, sampling, guidance_scale)
    made = extract_features(batches, extractor, name=f"{sampling} guidance {guidance_scale:g}".strip())
    result = compare_features(real, made, extractor=extractor)
    return Point(sampling, guidance_scale, result.fid, result.kid)


def seconds_per_image(
    model: Any,
    tokenizer: ImageTokenizer,
    *,
    sampling: Sampling,
    guidance_scale: float,
    batch_size: int,
    repeats: int,
) -> float:
    """Median over `repeats` batches of the time from labels to pixels, after one that is not counted."""
    labels = balanced_labels(batch_size, model.num_classes)

    def draw() -> None:
        list(draw_images(model, tokenizer, labels, sampling, guidance_scale, batch_size))

    draw()
    return median_seconds([draw], repeats, model.device)[0] / batch_size


def picture_sheet(
    model: Any, tokenizer: ImageTokenizer, *, sampling: Sampling, guidance_scale: float, seeds_per_class: int
) -> Tensor:
    """Images uint8 `[classes * seeds 3 H W]`, one class after the other, each with the same seeds."""
    labels = torch.arange(model.num_classes).repeat_interleave(seeds_per_class)
    seeds = list(range(seeds_per_class)) * model.num_classes
    return decode(tokenizer, draw_tokens(model, labels, seeds, sampling, guidance_scale).data)
