"""A tiny pipeline of every family of generators, with random weights that make conditions and positions matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import vistok
from vistok.models.generators.text_features import TextFeatures
from vistok.pipelines.base import ImagePipeline

SIZES = {"codebook_size": 20, "num_tokens": 16, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 16}
CLASSES = {**SIZES, "num_classes": 5}
TEXTS = {**SIZES, "text_dim": 12}
TEXT_WIDTH, TEXT_LENGTH = 12, 6


def grid_tokenizer() -> vistok.VQGAN:
    """16 px, a grid of 4 x 4 tokens."""
    return vistok.VQGAN(
        image_size=16, codebook_size=20, codebook_dim=4, latent_dim=8, dim=32, dim_mults=(1, 1, 1), depth=1
    )


def sequence_tokenizer() -> vistok.ConvTiTok:
    """16 px, a sequence of 16 tokens of which prefixes can be decoded."""
    return vistok.ConvTiTok(
        image_size=16, num_tokens=16, levels=(5, 4), dim=16, num_heads=2, conv_dim=8, conv_depth=1
    )


def encode(texts: Sequence[str]) -> TextFeatures:
    """A text encoder: features that a text decides, as long as the text."""
    features = torch.zeros(len(texts), TEXT_LENGTH, TEXT_WIDTH)
    keep = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.bool)
    for row, text in enumerate(texts):
        seed = sum(text.encode())
        features[row] = torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
        keep[row, : max(1, min(len(text), TEXT_LENGTH))] = True
    return TextFeatures(features, keep)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "text-ar": (
        sequence_tokenizer,
        lambda: vistok.TextAR(**SIZES, text_length=16, ngram_buckets=64),
    ),
    "flex-ar-class": (sequence_tokenizer, lambda: vistok.FlexARClass(**CLASSES)),
    "flex-ar-text": (sequence_tokenizer, lambda: vistok.FlexARText(**TEXTS)),
    "maskgit-bert": (sequence_tokenizer, lambda: vistok.MaskGITBert(**CLASSES)),
    "maskgit-uvit-grid": (grid_tokenizer, lambda: vistok.MaskGITUViT(**CLASSES, grid=(4, 4))),
    "llamagen-class": (grid_tokenizer, lambda: vistok.LlamaGenClass(**CLASSES)),
    "llamagen-text": (
        grid_tokenizer,
        lambda: vistok.LlamaGenText(**TEXTS, max_text_length=TEXT_LENGTH),
    ),
    "nar-class": (grid_tokenizer, lambda: vistok.NARClass(**CLASSES)),
    "nar-text": (grid_tokenizer, lambda: vistok.NARText(**TEXTS, max_text_length=TEXT_LENGTH)),
    "any-order-raster": (grid_tokenizer, lambda: vistok.AnyOrderAR(**CLASSES, layout="4x4")),
    "any-order-cells": (
        grid_tokenizer,
        lambda: vistok.AnyOrderAR(**CLASSES, layout="4x4", order="cells-2"),
    ),
    "any-order-random-sequence": (
        sequence_tokenizer,
        lambda: vistok.AnyOrderAR(**CLASSES, layout="sequence", order="random-3"),
    ),
    "any-order-masked": (grid_tokenizer, lambda: vistok.AnyOrderMasked(**CLASSES, layout="4x4")),
}
CLASS_FAMILIES = [name for name in FAMILIES if "text" not in name]
TEXT_FAMILIES = [name for name in FAMILIES if "text" in name]
MASKED = ["maskgit-bert", "maskgit-uvit-grid", "any-order-masked"]
RASTER_SEQUENCE = ["text-ar", "flex-ar-class", "flex-ar-text"]


def make_pipeline(family: str, **preset: Any) -> Any:
    """The pipeline of a family; a text encoder is in place where one is needed."""
    torch.manual_seed(0)
    make_tokenizer, make_generator = FAMILIES[family]
    generator = make_generator()
    for parameter in generator.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    kind = vistok.TextToImagePipeline if family in TEXT_FAMILIES else vistok.ClassToImagePipeline
    pipeline: ImagePipeline = kind(make_tokenizer().eval(), generator.eval(), **preset)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, vistok.TextToImagePipeline):
        pipeline.text_encoder = encode
    return pipeline


def prompts_of(family: str, count: int) -> list[Any]:
    """Different conditions, repeated from the fifth on."""
    names: list[Any] = ["cat", "dog", "a b", "x", "tree"] if family in TEXT_FAMILIES else [3, 1, 0, 4, 2]
    return [names[i % 5] for i in range(count)]


def draw(pipeline: Any, *args: Any, **options: Any) -> torch.Tensor:
    """The token ids of a call, `[b n]`."""
    return pipeline(*args, output_type="tokens", **options).images.data
