"""The emoji set as a measure: real images with their features, and names drawn from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vistok.data.emoji import Emoji, read_index
from vistok.data.images import open_rgb, resize_and_crop
from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import FeatureSet, extract_features
from vistok.eval.sources import pixels

BATCH_SIZE = 50


@dataclass(frozen=True)
class RealSet:
    """The whole emoji set with its features."""

    emoji: list[Emoji]
    images: Tensor  # [m 3 H W] uint8
    features: FeatureSet  # of the m images
    by_name: dict[str, int]  # index of the emoji that stands for a name

    @classmethod
    def read(
        cls,
        folder: Path,
        image_size: int,
        extractor: FeatureExtractor,
        emoji: Sequence[Emoji] | None = None,
    ) -> RealSet:
        """Read the set in `folder`, or some of its `emoji`, at `image_size` and extract its features."""
        emoji = read_index(folder) if emoji is None else list(emoji)
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


def read_images(folder: Path, emoji: Sequence[Emoji], image_size: int) -> Tensor:
    """The pictures of `emoji` as uint8 `[n 3 image_size image_size]`."""
    return torch.stack(
        [pixels(resize_and_crop(open_rgb(folder / entry.file), image_size)) for entry in emoji]
    )
