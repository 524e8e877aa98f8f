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
LATENTS = {"latent_dim": 3, "latent_scale": 0.5, "num_tokens": 16, "layout": "4x4", "num_classes": 5}
STACKS = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_dim": 16}
DENOISER = {"num_buffer_tokens": 2, "denoiser_dim": 16, "denoiser_depth": 1}


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


def latent_tokenizer(**changes: Any) -> vistok.KLTokenizer:
    """16 px, a grid of 4 x 4 latents of 3 channels."""
    sizes = {"latent_channels": 3, "dims": (8, 8, 8), "depth": 1, "num_groups": 4, "scaling_factor": 0.5}
    return vistok.KLTokenizer(**{"image_size": 16, **sizes, **changes})


def encode(texts: Sequence[str]) -> TextFeatures:
    """A text encoder: features that a text decides, as long as the text."""
    features = torch.zeros(len(texts), TEXT_LENGTH, TEXT_WIDTH)
    keep = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.bool)
    for row, text in enumerate(texts):
        seed = sum(text.encode())
        features[row] = torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
        keep[row, : max(1, min(len(text), TEXT_LENGTH))] = True
    return TextFeatures(features, keep)


Parts = tuple[Callable[[], Any], Callable[[], Any]]  # tokenizer, generator
FAMILIES: dict[str, Parts] = {  # of codes
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
CONTINUOUS: dict[str, Parts] = {
    "xar-cells": (latent_tokenizer, lambda: vistok.XAR(**LATENTS, **STACKS, order="cells-2")),
    "xar-diagonal": (latent_tokenizer, lambda: vistok.XAR(**LATENTS, **STACKS, order="diagonal")),
    "mar": (latent_tokenizer, lambda: vistok.MAR(**LATENTS, **STACKS, **DENOISER)),
}
# Few denoising steps, and none at timesteps where a random network's errors are multiplied by 2e4.
PRESETS = dict.fromkeys(CONTINUOUS, {"num_inference_steps": 4})
PRESETS["mar"] = {"num_inference_steps": 4, "num_steps": 5, "last_timestep": 900}
CLASS_FAMILIES = [name for name in FAMILIES if "text" not in name]
TEXT_FAMILIES = [name for name in FAMILIES if "text" in name]
MASKED = ["maskgit-bert", "maskgit-uvit-grid", "any-order-masked"]
RASTER_SEQUENCE = ["text-ar", "flex-ar-class", "flex-ar-text"]


def make_pipeline(family: str, **preset: Any) -> Any:
    """The pipeline of a family; a text encoder is in place where one is needed."""
    torch.manual_seed(0)
    make_tokenizer, make_generator = (FAMILIES | CONTINUOUS)[family]
    generator = make_generator()
    for parameter in generator.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 if family in CONTINUOUS else 0.5)
    kind = vistok.TextToImagePipeline if family in TEXT_FAMILIES else vistok.ClassToImagePipeline
    settings = PRESETS.get(family, {}) | preset
    pipeline: ImagePipeline = kind(make_tokenizer().eval(), generator.eval(), **settings)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, vistok.TextToImagePipeline):
        pipeline.text_encoder = encode
    return pipeline


def prompts_of(family: str, count: int) -> list[Any]:
    """Different conditions, repeated from the fifth on."""
    names: list[Any] = ["cat", "dog", "a b", "x", "tree"] if family in TEXT_FAMILIES else [3, 1, 0, 4, 2]
    return [names[i % 5] for i in range(count)]


def draw(pipeline: Any, *args: Any, **options: Any) -> torch.Tensor:
    """The token ids of a call, `[b n]`, or its latents, `[b n c]`."""
    return pipeline(*args, output_type="tokens", **options).images.data


def is_same(drawn: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether token ids are equal, or latents but for the rounding of another batch size."""
    if not expected.is_floating_point():
        return torch.equal(drawn, expected)
    return bool((drawn - expected).abs().max() <= 1e-4 * expected.abs().max())
