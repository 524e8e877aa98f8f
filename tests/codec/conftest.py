from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tests.tiny import GENERATOR, TOKENIZER
from vistok.codec.codec import ImageCodec
from vistok.models.generators.text_ar import TextAR
from vistok.models.tokenizers.conv_titok import ConvTiTok

# A loaded machine is no reason to fail, and a failure must come again.
settings.register_profile("vistok", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("vistok")


def make_generator(seed: int = 0, **changes: int) -> TextAR:
    """A tiny generator that is sure of itself: its logits spread over some 10 nats."""
    torch.manual_seed(seed)
    generator = TextAR(**GENERATOR | changes).eval()
    with torch.no_grad():
        generator.token_embed.weight.mul_(50)
    return generator


@pytest.fixture(scope="session")
def tokenizer() -> ConvTiTok:
    torch.manual_seed(0)
    return ConvTiTok(**TOKENIZER).eval()


@pytest.fixture(scope="session")
def generator() -> TextAR:
    return make_generator()


@pytest.fixture(scope="session")
def uniform_codec(tokenizer: ConvTiTok) -> ImageCodec:
    return ImageCodec(tokenizer)


@pytest.fixture(scope="session")
def prior_codec(tokenizer: ConvTiTok, generator: TextAR) -> ImageCodec:
    return ImageCodec(tokenizer, generator)
