"""What is measured of a text -> emoji model: held-out reconstruction, recognition, Fréchet distance."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vistok.data.emoji import Emoji, read_index
from vistok.data.images import open_rgb, resize_and_crop
from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import FeatureSet, FidResult, compare_features, extract_features
from vistok.eval.machine import Machine, describe_machine
from vistok.eval.neighbours import Share, chance_level, nearest, share_of
from vistok.eval.reconstruction import ReconstructionResult, evaluate_reconstruction
from vistok.eval.sources import pixels, to_float, to_uint8
from vistok.models.tokenizers.base import ImageTokenizer

BATCH_SIZE = 50


@dataclass(frozen=True)
class Recognition:
    """Share of images whose nearest real image has the subcategory of the emoji that was asked for."""

    every: Share
    train: Share
    heldout: Share


@dataclass(frozen=True)
class EmojiReport:
    """Everything measured, with its protocol."""

    model: str
    num_names: int
    seeds_per_name: int
    seed: int
    num_real: int
    num_subcategories: int
    sampling: dict[str, Any]
    reconstruction: ReconstructionResult  # held-out emoji
    reconstruction_all: ReconstructionResult  # all emoji
    generated: Recognition
    reconstructed: Recognition  # upper bound: the tokenizer's reconstruction of the emoji that was asked for
    chance: float
    fid: FidResult
    images_per_second: float  # generation in batches of `batch_size`
    batch_size: int
    machine: Machine

    def to_json(self) -> str:
        """Indented JSON with all fields."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def evaluate_emoji(
    pipeline: Any,
    folder: Path,
    *,
    model: str,
    extractor: FeatureExtractor,
    num_names: int = 200,
    seeds_per_name: int = 2,
    seed: int = 0,
    sampling: dict[str, Any] | None = None,
) -> EmojiReport:
    """Measure a text-to-image pipeline on the emoji set.

    Args:
        pipeline: a `TextToImagePipeline`.
        folder: the set built by `vistok.data.emoji`.
        model: its name, for the report.
        extractor: features in which images are compared.
        num_names: distinct emoji names to draw, from both splits; those too long for the generator are left out.
        seeds_per_name: images per name; image j of name i uses seed `i + j * num_names`.
        seed: of the choice of names.
        sampling: what to sample with instead of the pipeline's preset, by name of the argument.

    Raises:
        FileNotFoundError: no built set in `folder`.
        ValueError: fewer names in the set than `num_names`.
    """
    sampling = sampling or {}
    reals = RealSet.read(folder, pipeline.tokenizer.image_size, extractor)
    text_length = pipeline.transformer.text_length
    readable = [name for name in reals.by_name if len(name.encode()) <= text_length]
    names = draw_names(readable, num_names, seed)
    prompts = names * seeds_per_name
    started = time.perf_counter()
    generated = generate(pipeline, prompts, list(range(len(prompts))), sampling)
    images_per_second = len(prompts) / (time.perf_counter() - started)
    rebuilt = reconstruct(pipeline.tokenizer, reals.images[[reals.by_name[name] for name in names]])
    made = extract_features(generated.split(BATCH_SIZE), extractor, name="generated")
    bound = extract_features(rebuilt.split(BATCH_SIZE), extractor, name="reconstructed")
    return EmojiReport(
        model=model,
        num_names=num_names,
        seeds_per_name=seeds_per_name,
        seed=seed,
        num_real=len(reals.emoji),
        num_subcategories=len(set(reals.subcategories)),
        sampling=pipeline.sampling_settings(**sampling),
        reconstruction=evaluate_reconstruction(pipeline.tokenizer, folder / "heldout"),
        reconstruction_all=evaluate_reconstruction(pipeline.tokenizer, folder),
        generated=recognise(prompts, made.features, reals),
        reconstructed=recognise(names, bound.features, reals),
        chance=chance_level([reals.named(name).subcategory for name in names], reals.subcategories),
        fid=compare_features(reals.one_per_name(), made, extractor=extractor, seed=seed),
        images_per_second=images_per_second,
        batch_size=BATCH_SIZE,
        machine=describe_machine(),
    )


@dataclass(frozen=True)
class RealSet:
    """The whole emoji set with its features."""

    emoji: list[Emoji]
    images: Tensor  # [m 3 H W] uint8
    features: FeatureSet  # of the m images
    by_name: dict[str, int]  # index of the emoji that stands for a name

    @classmethod
    def read(cls, folder: Path, image_size: int, extractor: FeatureExtractor) -> RealSet:
        """Read the set in `folder` at `image_size` and extract its features."""
        emoji = read_index(folder)
        images = read_images(folder, emoji, image_size)
        features = extract_features(images.split(BATCH_SIZE), extractor, name="real, one per name")
        return cls(emoji=emoji, images=images, features=features, by_name=first_by_name(emoji))

    @property
    def subcategories(self) -> list[str]:
        """Of all images, in order."""
        return [entry.subcategory for entry in self.emoji]

    def named(self, name: str) -> Emoji:
        """The emoji that stands for a name."""
        return self.emoji[self.by_name[name]]

    def one_per_name(self) -> FeatureSet:
        """The features without variants: prompts are names, so no skin tone is ever asked for."""
        return replace(self.features, features=self.features.features[list(self.by_name.values())])


def first_by_name(emoji: Sequence[Emoji]) -> dict[str, int]:
    """Name -> index of its entry without a skin tone: variants are entries of their own with the same name."""
    by_name: dict[str, int] = {}
    for index in sorted(range(len(emoji)), key=lambda index: emoji[index].skin_tone != ""):
        by_name.setdefault(emoji[index].name, index)
    return by_name


def draw_names(names: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` different names, the same for a seed whatever the order of `names`.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(names):
        raise ValueError(f"the set holds {len(names)} names, fewer than the {count} asked for")
    return random.Random(seed).sample(sorted(names), count)


def generate(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: dict[str, Any]) -> Tensor:
    """One image per prompt and seed: uint8 `[n 3 H W]`."""
    images = []
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc="generate", unit="batch"):
        part = slice(start, start + BATCH_SIZE)
        output = pipeline(list(prompts[part]), seed=list(seeds[part]), output_type="pt", **sampling)
        images.append(to_uint8(output.images))
    return torch.cat(images)


def read_images(folder: Path, emoji: Sequence[Emoji], image_size: int) -> Tensor:
    """The pictures of `emoji` as uint8 `[n 3 image_size image_size]`."""
    return torch.stack(
        [pixels(resize_and_crop(open_rgb(folder / entry.file), image_size)) for entry in emoji]
    )


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """uint8 `[n 3 H W]` -> the tokenizer's reconstructions, uint8 `[n 3 H W]`."""
    batches = images.split(BATCH_SIZE)
    return torch.cat(
        [
            to_uint8(tokenizer.decode(tokenizer.encode(to_float(batch).to(tokenizer.device))))
            for batch in batches
        ]
    )


def recognise(names: Sequence[str], features: Tensor, reals: RealSet) -> Recognition:
    """Compare the subcategory of each image's nearest real neighbour with the one asked for.

    Args:
        names: the emoji asked for, one for each image.
        features: of the images, `[n d]`.
        reals: where neighbours are looked for.
    """
    neighbours = nearest(features, reals.features.features).tolist()
    wanted = [reals.named(name) for name in names]
    hits = [
        entry.subcategory == reals.emoji[index].subcategory
        for entry, index in zip(wanted, neighbours, strict=True)
    ]
    return Recognition(
        every=share_of(hits),
        train=share_of([hit for hit, entry in zip(hits, wanted, strict=True) if entry.split == "train"]),
        heldout=share_of([hit for hit, entry in zip(hits, wanted, strict=True) if entry.split == "heldout"]),
    )
