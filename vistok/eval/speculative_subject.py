"""Whose speculative decoding is measured: a generator with the images that it draws, and what these are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.data.cifar10 import load_cifar10
from vistok.data.emoji import read_index
from vistok.decoding.speculative.generate import Speculation
from vistok.decoding.streams import ImageStreams
from vistok.eval.emoji_measures import recognise
from vistok.eval.emoji_set import RealSet, first_by_name, read_images
from vistok.eval.features import FeatureExtractor, load_extractor
from vistok.eval.fid import FeatureSet, compare_features, extract_features
from vistok.eval.generator_measures import all_tokens, balanced_labels, decode
from vistok.eval.kept_features import kept_features
from vistok.eval.neighbours import Share
from vistok.eval.token_laws import LawCheck, check_laws
from vistok.eval.watermark import drawn_emoji
from vistok.hub import load, load_tokenizer
from vistok.models.generators.base import NextTokenGenerator
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.drawing import Conditions, Request, draw
from vistok.pipelines.fit import check_fit
from vistok.pipelines.settings import OrderedSettings, settings_for
from vistok.pipelines.speculation import SpeculativeDecoding, speculate
from vistok.tokens import Tokens

BATCH_SIZE = 16  # of the images whose quality is measured
NUM_REAL = 2000  # test images of CIFAR-10


@dataclass(frozen=True)
class Subject:
    """A generator and the images that it draws.

    Args:
        name: of the model.
        model: the generator.
        tokenizer: of its tokens.
        settings: how it is sampled.
        conditions: `[n ...]`, of all images; image i has the seed i.
    """

    name: str
    model: NextTokenGenerator
    tokenizer: ImageTokenizer
    settings: OrderedSettings
    conditions: Tensor

    def __len__(self) -> int:
        return len(self.conditions)

    def batches(self, num_images: int, batch_size: int) -> list[range]:
        """The first images."""
        starts = range(0, num_images, batch_size)
        return [range(start, min(start + batch_size, num_images)) for start in starts]

    @torch.inference_mode()
    def plain(self, images: range, first_seed: int = 0) -> Tokens:
        """Tokens of some images."""
        return draw(self.model, self.settings, self._request(images, first_seed))

    @torch.inference_mode()
    def speculate(
        self, images: range, decoding: SpeculativeDecoding, num_tokens: int | None = None
    ) -> Speculation:
        """Tokens of some images, or the first few of them."""
        return speculate(self.model, self.settings, self._request(images, 0, num_tokens), decoding)

    def _request(self, images: range, first_seed: int, num_tokens: int | None = None) -> Request:
        lengths = all_tokens(self.model, len(images))
        return Request(
            Conditions(self.conditions[images.start : images.stop]),
            ImageStreams.from_seeds([first_seed + image for image in images]),
            lengths if num_tokens is None else lengths.clamp_max(num_tokens),
            given=None,
            logits_processor=None,
            on_step=lambda step, tokens: None,
        )

    def check_laws(self, tokens: Tokens) -> LawCheck:
        """Whether the tokens of all images follow the generator."""
        indices = tokens.data.to(self.model.device)
        return check_laws(self.model, self.conditions, indices, self.settings, batch_size=BATCH_SIZE)


@dataclass(frozen=True)
class Quality:
    """Of all images."""

    frechet_distance: float
    recognised: Share | None  # of emoji


@dataclass(frozen=True)
class Judge:
    """Measures the quality of images.

    Args:
        extractor: of features.
        real: what images are compared with.
        names: the emoji that was asked for, for each image; with `reals`.
        reals: the emoji that drawn ones are recognised by.
    """

    extractor: FeatureExtractor
    real: FeatureSet
    names: list[str] | None = None
    reals: RealSet | None = None

    def __call__(self, subject: Subject, tokens: Tokens, name: str) -> Quality:
        """Decode the tokens of all images and measure them."""
        parts = subject.batches(len(subject), BATCH_SIZE)
        images = (decode(subject.tokenizer, tokens[part.start : part.stop]) for part in parts)
        made = extract_features(images, self.extractor, name=name)
        share = None
        if self.names is not None and self.reals is not None:
            share = recognise(self.names, made.features, self.reals).every
        return Quality(compare_features(self.real, made, extractor=self.extractor).fid, share)


@dataclass(frozen=True)
class Parts:
    """A generator with its tokenizer and how it is sampled."""

    name: str
    model: NextTokenGenerator
    tokenizer: ImageTokenizer
    settings: OrderedSettings

    @classmethod
    def load(cls, name: str, tokenizer: str | None, sampling: dict[str, Any], **options: Any) -> Parts:
        """A pipeline, or a generator and a tokenizer.

        Args:
            name: a pipeline by the names of `vistok.load`, or with a `tokenizer` a generator.
            tokenizer: likewise.
            sampling: settings by name; `None` is the pipeline's own, or our default.
            options: for `vistok.load`.

        Raises:
            ValueError: not a next-token generator, one without its tokenizer, or two that do not fit.
        """
        loaded = load(name, **options)
        model = getattr(loaded, "transformer", loaded)
        if not isinstance(model, NextTokenGenerator):
            raise ValueError(
                f"{name} does not decide one token after the other: there is nothing to speculate about"
            )
        title = Path(name).resolve().name if Path(name).exists() else name
        if model is not loaded:
            settings = settings_for(model, loaded.sampling_settings(**sampling))
            parts = cls(title, model, loaded.tokenizer, settings)  # type: ignore[arg-type]
        elif tokenizer is None:
            raise ValueError(f"{name} is a generator: name its tokenizer with --tokenizer")
        else:
            settings = settings_for(model, sampling)
            parts = cls(title, model, load_tokenizer(tokenizer, **options), settings)  # type: ignore[arg-type]
        check_fit(parts.tokenizer, parts.model)
        return parts


def emoji_subject(
    parts: Parts, folder: Path, num_images: int, extractor: FeatureExtractor, kept: Path
) -> tuple[Subject, Judge]:
    """Images of emoji names drawn at random, compared with all real ones in `folder`, one per name.

    Args:
        parts: a text-to-image generator that reads texts itself.
        folder: the emoji set.
        num_images: how many.
        extractor: of features.
        kept: the folder that keeps features of real images between calls.

    Raises:
        FileNotFoundError: no built set in `folder`.
        ValueError: the set has fewer names that the generator can read.
    """
    text_model: Any = parts.model
    names = [entry.name for entry in drawn_emoji(folder, num_images, text_model.text_length)]
    index = read_index(folder)
    emoji = [index[number] for number in first_by_name(index).values()]
    images = read_images(folder, emoji, parts.tokenizer.image_size)
    features = kept_features(images, extractor, name="real emoji, one per name", folder=kept)
    reals = RealSet(emoji, images, features, first_by_name(emoji))
    conditions = text_model.encode_text(names)
    subject = Subject(parts.name, parts.model, parts.tokenizer, parts.settings, conditions)
    return subject, Judge(extractor, features, names, reals)


def class_subject(
    parts: Parts, cifar10: Path | None, num_images: int, extractor: FeatureExtractor | None, kept: Path
) -> tuple[Subject, Judge | None]:
    """Images of every class in turn, compared with test images of CIFAR-10 if there is a folder and an extractor.

    Args:
        parts: a class-to-image generator.
        cifar10: the folder of CIFAR-10.
        num_images, extractor, kept: see `emoji_subject`.

    Raises:
        FileNotFoundError: CIFAR-10 is not in the folder.
    """
    class_model: Any = parts.model
    labels = balanced_labels(num_images, class_model.num_classes)
    subject = Subject(parts.name, parts.model, parts.tokenizer, parts.settings, labels)
    if cifar10 is None or extractor is None:
        return subject, None
    images = load_cifar10(cifar10, "test")[0][:NUM_REAL]
    return subject, Judge(
        extractor, kept_features(images, extractor, name="test images of CIFAR-10", folder=kept)
    )


def load_subject(
    parts: Parts, data: Path | None, num_images: int, extractor: str, kept: Path
) -> tuple[Subject, Judge | None]:
    """`emoji_subject` or `class_subject`, by what the generator is conditioned on; without `data` quality is not measured.

    Raises:
        ValueError: it is conditioned on features of texts, or on texts, and there is no `data`.
        FileNotFoundError, ModuleNotFoundError: see both, and `load_extractor`.
    """
    is_text = not hasattr(parts.model, "num_classes")
    if is_text and not hasattr(parts.model, "encode_text"):
        raise ValueError(f"{parts.name} reads features of texts, for which there are no data to measure with")
    if is_text and data is None:
        raise ValueError(f"{parts.name} draws from texts: give the folder of the emoji set with --data")
    features = None if data is None else load_extractor(extractor, device=parts.model.device)
    if is_text:
        assert data is not None and features is not None
        return emoji_subject(parts, data, num_images, features, kept)
    return class_subject(parts, data, num_images, features, kept)
