"""What is measured of a text -> emoji model: held-out reconstruction, recognition, Fréchet distance."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vistok.eval.emoji_lengths import LengthPoint, length_curve
from vistok.eval.emoji_set import BATCH_SIZE, RealSet, draw_names
from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import FidResult, compare_features, extract_features
from vistok.eval.machine import Machine, describe_machine
from vistok.eval.neighbours import Share, chance_level, nearest, share_of
from vistok.eval.reconstruction import ReconstructionResult, evaluate_reconstruction
from vistok.eval.sources import to_float, to_uint8
from vistok.models.tokenizers.base import ImageTokenizer


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
    lengths: list[LengthPoint]  # what the first tokens alone give; one point for a tokenizer of fixed length
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
        lengths=length_curve(pipeline.tokenizer, reals, names, extractor),
        fid=compare_features(reals.one_per_name(), made, extractor=extractor, seed=seed),
        images_per_second=images_per_second,
        batch_size=BATCH_SIZE,
        machine=describe_machine(),
    )


def generate(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: dict[str, Any]) -> Tensor:
    """One image per prompt and seed: uint8 `[n 3 H W]`."""
    images = []
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc="generate", unit="batch"):
        part = slice(start, start + BATCH_SIZE)
        output = pipeline(list(prompts[part]), seed=list(seeds[part]), output_type="pt", **sampling)
        images.append(to_uint8(output.images))
    return torch.cat(images)


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
