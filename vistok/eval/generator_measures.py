"""How good and how fast a class-conditional generator is: Fréchet distance, steps and seconds per image, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.streams import ImageStreams
from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import FeatureSet, compare_features, extract_features
from vistok.eval.sources import to_uint8
from vistok.eval.timing import median_seconds
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.drawing import Conditions, Request, draw, num_steps
from vistok.pipelines.settings import DenoisingSettings, Settings, settings_for, settings_kind
from vistok.tokens import Tokens


@dataclass(frozen=True)
class Sampling:
    """How a generator is sampled, besides guidance: the settings of its pipeline that are not left at their defaults.

    Args:
        settings: names and values, see `vistok.pipelines.settings`.
    """

    settings: dict[str, Any] = field(default_factory=dict)

    def check(self, model_class: type) -> None:
        """Raises ValueError unless generators of this class have these settings."""
        kind = settings_kind(model_class)
        known = [field.name for field in fields(kind)]
        for name in self.settings:
            if name not in known:
                raise ValueError(
                    f"{name} is not a setting of a {model_class.__name__}; it has {', '.join(known)}"
                )
        kind(**self.settings)  # raises where a value is out of range

    def of(self, model: Any, guidance_scale: float = 1.0) -> Settings:
        """The settings of `model`."""
        return settings_for(model, {**self.settings, "guidance_scale": guidance_scale})

    def steps(self, model: Any) -> int:
        """Steps per image, at each of which the generator decides some tokens."""
        return num_steps(model, self.of(model), all_tokens(model, 1))

    def denoising_steps(self, model: Any) -> int | None:
        """Denoising steps per image; `None` for a generator of codes."""
        settings = self.of(model)
        if not isinstance(settings, DenoisingSettings):
            return None
        return sum(settings.denoising_steps(self.steps(model)))

    def __str__(self) -> str:
        return ", ".join(
            f"{name.removeprefix('num_').replace('_', ' ')} {value}" for name, value in self.settings.items()
        )


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
    tokenizer: str  # its identity
    sampling: str  # what is not the default; may be empty
    order: str
    num_parameters: int
    num_steps: int  # per image
    num_denoising_steps: int | None  # per image, of a generator of continuous tokens
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


def all_tokens(model: Any, batch_size: int) -> Tensor:
    """The length of an image, once per image `[b]`."""
    return torch.full((batch_size,), model.num_tokens)


@torch.inference_mode()
def draw_tokens(
    model: Any, labels: Tensor, seeds: Sequence[int], sampling: Sampling, guidance_scale: float
) -> Tokens:
    """Tokens of one image per label `[b]` and seed."""
    request = Request(
        Conditions(labels),
        ImageStreams.from_seeds(seeds),
        all_tokens(model, len(labels)),
        given=None,
        logits_processor=None,
        on_step=lambda step, tokens: None,
    )
    return draw(model, sampling.of(model, guidance_scale), request)


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
        yield decode(tokenizer, tokens)


@torch.inference_mode()
def decode(tokenizer: ImageTokenizer, tokens: Tokens) -> Tensor:
    """Images uint8 `[b 3 H W]`."""
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
    return decode(tokenizer, draw_tokens(model, labels, seeds, sampling, guidance_scale))
