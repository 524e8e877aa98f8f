"""Any tokenizer with any generator of its vocabulary and layout: published tokenizers, generators made for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vistok
from tests.golden_checks.case import GoldenCase
from tests.pipelines.families import grid_tokenizer
from vistok.models import upstream
from vistok.models.tokenizers.base import ImageTokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
SIZES = {"num_classes": 5, "dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 32}


def published(system: str, name: str) -> ImageTokenizer:
    case = GoldenCase.read(GOLDENS / system / name)
    tokenizer: Any = upstream.load(system, case.weights, case.config)
    return tokenizer


TOKENIZERS = {
    "titok": lambda: published("titok", "tiny_vq_two_stage.json"),
    "one-d-piece": lambda: published("one_d_piece", "tiny.json"),
    "flextok": lambda: published("flextok", "flextok_tiny.json"),
    "vqgan": grid_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> ImageTokenizer:
    return TOKENIZERS[request.param]().eval()


def generators(tokenizer: ImageTokenizer) -> list[Any]:
    """Raster, random and masked ones for any tokenizer, next neighbour for grids."""
    shape = {"codebook_size": tokenizer.codebook_size, "num_tokens": tokenizer.num_tokens}
    layout = str(tokenizer.layout)
    fitting: list[Any] = [
        vistok.AnyOrderAR(**SIZES, **shape, layout=layout, order="raster"),
        vistok.AnyOrderAR(**SIZES, **shape, layout=layout, order="random-0"),
        vistok.AnyOrderMasked(**SIZES, **shape, layout=layout),
        vistok.MaskGITBert(**SIZES, **shape, grid=tokenizer.layout.grid),
    ]
    if tokenizer.layout.grid is not None:
        fitting += [vistok.LlamaGenClass(**SIZES, **shape), vistok.NARClass(**SIZES, **shape)]
    return fitting


def test_every_generator_draws_tokens_that_the_tokenizer_decodes(tokenizer: ImageTokenizer) -> None:
    torch.manual_seed(0)
    for generator in generators(tokenizer):
        pipeline = vistok.ClassToImagePipeline(tokenizer, generator.eval())
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline([1, 2], seed=[3, 4], guidance_scale=2.0, output_type="pt").images
        assert images.shape == (2, 3, tokenizer.image_size, tokenizer.image_size)
        assert torch.isfinite(images).all() and not torch.equal(images[0], images[1])
        picture = pipeline.tokenizer.encode(images)  # and back: a picture's tokens can stay in the next
        keep = torch.arange(tokenizer.num_tokens) % 2 == 0
        kept = pipeline([1, 2], seed=[3, 4], tokens=picture, keep=keep, output_type="tokens").images
        assert torch.equal(kept.data[:, keep], picture.data[:, keep])


def test_a_grid_s_generators_refuse_a_sequence(tokenizer: ImageTokenizer) -> None:
    shape = {"codebook_size": tokenizer.codebook_size, "num_tokens": 16}
    for kind in (vistok.LlamaGenClass, vistok.NARClass):
        if tokenizer.layout.grid is None:
            with pytest.raises(
                ValueError, match="it makes tokens on a grid of 4x4, the tokenizer decodes them in"
            ):
                vistok.ClassToImagePipeline(tokenizer, kind(**SIZES, **shape))
