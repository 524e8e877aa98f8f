"""The families that `vistok.eval.speed` times, at released sizes and as they are published to be sampled.

Weights are random but for those that ship with the package; time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vistok.decoding.guidance import GuidanceSchedule, LinearGuidance, PowerCosineGuidance
from vistok.eval.continuous_ways import MARFamily, XARFamily
from vistok.eval.random_weights import randomize
from vistok.eval.speed_subjects import (
    ContinuousSubject,
    MaskedSubject,
    OrderedSubject,
    Subject,
    TokenizerSubject,
)
from vistok.eval.tokenizer_speed import build_tokenizer
from vistok.hub import load
from vistok.models.generators import llamagen, mar, maskgit, nar, xar
from vistok.models.generators.base import OrderedGenerator
from vistok.models.generators.flex_ar import FlexARText
from vistok.models.generators.llamagen import LlamaGenClass, LlamaGenText
from vistok.models.generators.mar import MAR
from vistok.models.generators.nar import NARClass
from vistok.models.generators.text_features import TextFeatures
from vistok.models.generators.xar import XAR
from vistok.models.tokenizers.vqgan import VQGAN

TEXT_LENGTH = 20  # positions of a text's features
SHIPPED, PROMPT = "emoji-64", "red apple"


def random_text(width: int) -> Callable[[int], TextFeatures]:
    """Features of so many texts, all of one length."""

    def features(batch_size: int) -> TextFeatures:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(batch_size, TEXT_LENGTH, width, generator=generator)
        return TextFeatures(values, torch.ones(batch_size, TEXT_LENGTH, dtype=torch.bool))

    return features


def _of_class(model: OrderedGenerator) -> Subject:
    return OrderedSubject(_random(model), torch.arange)


def _llamagen_text() -> Subject:
    model = _random(LlamaGenText(**llamagen.PRESETS["XL"]))
    return OrderedSubject(model, random_text(model.prefix.text_dim), scale=7.5)


def _flex_ar(size: int) -> Subject:
    """By the rule of the family: `64 size` wide, `size` deep."""
    dim = 64 * size
    model = _random(FlexARText(dim=dim, depth=size, num_heads=size, mlp_dim=8 * dim // 3))
    text = random_text(model.text_dim)
    return OrderedSubject(model, text, text, scale=3.0, text_length=TEXT_LENGTH)


def _shipped() -> Subject:
    model = load(SHIPPED).transformer
    return OrderedSubject(model, lambda batch_size: model.encode_text([PROMPT] * batch_size))


def _masked(preset: str, num_steps: int, guidance: GuidanceSchedule) -> Subject:
    model_class: Any
    model_class, sizes = maskgit.PRESETS[preset]
    return MaskedSubject(_random(model_class(**sizes)), num_steps, guidance)


def _xar(size: str) -> Subject:
    published = xar.SAMPLING[size]
    steps, scale = int(published["num_inference_steps"]), published["guidance_scale"]
    model = _random(XAR(**xar.PRESETS[size]))
    family = XARFamily(model, num_inference_steps=steps, scale=scale)
    shares = tuple(share for share in (1, 2, 4, 5, 8, 10) if steps % share == 0)
    protocol = f"{model.num_tokens} tokens in {model.order.num_steps} x {steps} steps, guidance to {scale:g}"
    return ContinuousSubject(family, shares, protocol)


def _mar(size: str) -> Subject:
    model = _random(MAR(**mar.PRESETS[size]))
    family = MARFamily(model, draft=model, scale=mar.SAMPLING[size]["guidance_scale"])
    steps = f"{family.num_steps} x {family.num_inference_steps} steps"
    protocol = f"{model.num_tokens} tokens in {steps}, guidance to {family.scale:g}"
    return ContinuousSubject(family, (1, 2, 4, 8, 16, 32), protocol)


def _tokenizer(family: str, num_tokens: int | None = None) -> Subject:
    return TokenizerSubject(build_tokenizer(family), num_tokens)


def _random(model: Any) -> Any:
    return randomize(model).eval()


FAMILIES: dict[
    str, Callable[[], Subject]
] = {  # class-conditional for 256 pixels unless the name says otherwise
    "llamagen-b": lambda: _of_class(LlamaGenClass(**llamagen.PRESETS["B"])),
    "nar-b": lambda: _of_class(NARClass(**nar.PRESETS["B"])),
    "llamagen-l": lambda: _of_class(LlamaGenClass(**llamagen.PRESETS["L"])),
    "nar-l": lambda: _of_class(NARClass(**nar.PRESETS["L"])),
    "llamagen-xl": lambda: _of_class(LlamaGenClass(**llamagen.PRESETS["XL"])),
    "nar-xl": lambda: _of_class(NARClass(**nar.PRESETS["XL"])),
    "llamagen-xl-text": _llamagen_text,
    "flexar-d12-text": lambda: _flex_ar(12),
    "flexar-d18-text": lambda: _flex_ar(18),
    SHIPPED: _shipped,
    "xar-b": lambda: _xar("base"),
    "xar-l": lambda: _xar("large"),
    "mar-b": lambda: _mar("base"),
    "maskgit-titok-l-32": lambda: _masked("maskgit-titok-l-32", 8, LinearGuidance(4.5)),
    "maskgit-titok-s-128": lambda: _masked("maskgit-titok-s-128", 64, PowerCosineGuidance(6.9, 2.8)),
    "titok-l-32": lambda: _tokenizer("titok-l-32"),
    "one-d-piece-s-256": lambda: _tokenizer("one-d-piece-s-256"),
    "flextok-d12-d12": lambda: _tokenizer("flextok-d12-d12-in1k"),
    "flextok-d12-d12-32-tokens": lambda: _tokenizer("flextok-d12-d12-in1k", 32),
    "llamagen-vq-16": lambda: TokenizerSubject(_random(VQGAN())),
}


def build_subject(family: str) -> Subject:
    """A family at its released size, in float32 and evaluation mode.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    torch.manual_seed(0)
    return FAMILIES[family]()
