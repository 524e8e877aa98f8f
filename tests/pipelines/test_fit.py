"""Any generator with any tokenizer of the same vocabulary, number and layout of tokens; the others are refused."""

from __future__ import annotations

import pytest

import vistok
from tests.pipelines.families import (
    CLASSES,
    DENOISER,
    LATENTS,
    STACKS,
    grid_tokenizer,
    latent_tokenizer,
    sequence_tokenizer,
)
from vistok.pipelines.fit import check_fit, objections

ON_A_GRID = {
    "llamagen": lambda: vistok.LlamaGenClass(**CLASSES),
    "nar": lambda: vistok.NARClass(**CLASSES),
    "any-order": lambda: vistok.AnyOrderAR(**CLASSES, layout="4x4", order="diagonal"),
    "any-order-masked": lambda: vistok.AnyOrderMasked(**CLASSES, layout="4x4"),
    "maskgit": lambda: vistok.MaskGITBert(**CLASSES, grid=(4, 4)),
}
IN_A_SEQUENCE = {
    "flex-ar": lambda: vistok.FlexARClass(**CLASSES),
    "any-order": lambda: vistok.AnyOrderAR(**CLASSES, layout="sequence"),
    "maskgit": lambda: vistok.MaskGITUViT(**CLASSES),
}


@pytest.mark.parametrize("name", ON_A_GRID)
def test_generators_of_grids(name: str) -> None:
    generator = ON_A_GRID[name]()
    check_fit(grid_tokenizer(), generator)
    message = (
        f"{type(generator).__name__} does not fit ConvTiTok: it makes tokens on a grid of 4x4, "
        "the tokenizer decodes them in a sequence without rows and columns"
    )
    with pytest.raises(ValueError, match=message):
        vistok.ClassToImagePipeline(sequence_tokenizer(), generator)


@pytest.mark.parametrize("name", IN_A_SEQUENCE)
def test_generators_of_sequences(name: str) -> None:
    generator = IN_A_SEQUENCE[name]()
    check_fit(sequence_tokenizer(), generator)
    with pytest.raises(
        ValueError, match="makes tokens in a sequence .*the tokenizer decodes them on a grid of 4x4"
    ):
        vistok.ClassToImagePipeline(grid_tokenizer(), generator)


def test_all_reasons_are_given_at_once() -> None:
    generator = vistok.LlamaGenClass(**CLASSES | {"codebook_size": 30, "num_tokens": 9})
    assert objections(grid_tokenizer(), generator) == [
        "its codebook_size is 30 and not 20",
        "its num_tokens is 9 and not 16",
        "it makes tokens on a grid of 3x3, the tokenizer decodes them on a grid of 4x4",
    ]


def test_a_continuous_tokenizer_is_refused() -> None:
    tokenizer = vistok.KLTokenizer(image_size=32, dims=(32, 32), latent_channels=4)
    with pytest.raises(
        ValueError,
        match="LlamaGenClass does not fit KLTokenizer: it makes codebook indices, .*continuous latents",
    ):
        vistok.ClassToImagePipeline(tokenizer, vistok.LlamaGenClass(**CLASSES))


CONTINUOUS = {
    "xar": lambda **changes: vistok.XAR(**LATENTS | changes, **STACKS, order="cells-2"),
    "mar": lambda **changes: vistok.MAR(**LATENTS | changes, **STACKS, **DENOISER),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_generators_of_latents(name: str) -> None:
    generator = CONTINUOUS[name]()
    check_fit(latent_tokenizer(), generator)
    check_fit(latent_tokenizer(scaling_factor=None), generator)  # it does not say which scale suits it
    assert objections(latent_tokenizer(latent_channels=4, scaling_factor=0.18215), generator) == [
        "its latent_dim is 3 and the tokenizer's latent_channels 4",
        "its latent_scale is 0.5 and the tokenizer's scaling_factor 0.18215",
    ]
    assert objections(latent_tokenizer(image_size=32, latent_channels=16), generator) == [
        "its latent_dim is 3 and the tokenizer's latent_channels 16",
        "its num_tokens is 16 and not 64",
        "it makes tokens on a grid of 4x4, the tokenizer decodes them on a grid of 8x8",
    ]
    kind = type(generator).__name__
    with pytest.raises(ValueError, match=f"{kind} does not fit KLTokenizer: its latent_scale is 0.4"):
        vistok.ClassToImagePipeline(latent_tokenizer(), CONTINUOUS[name](latent_scale=0.4))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_generators_of_latents_and_tokenizers_of_codes(name: str) -> None:
    generator = CONTINUOUS[name]()
    kinds = "it makes continuous latents, the tokenizer decodes codebook indices"
    assert objections(grid_tokenizer(), generator) == [kinds]
    with pytest.raises(ValueError, match=f"does not fit ConvTiTok: {kinds}; it makes tokens on a grid of"):
        vistok.ClassToImagePipeline(sequence_tokenizer(), generator)


def test_a_grid_of_another_number_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a grid of \[4, 5\] does not have 16 positions"):
        vistok.MaskGITBert(**CLASSES, grid=(4, 5))


def test_a_generator_without_a_known_way_to_sample_is_refused() -> None:
    from vistok.models.generators.base import Generator
    from vistok.pipelines.settings import settings_for

    with pytest.raises(
        ValueError, match="Generator is neither of the kind OrderedGenerator nor of MaskedGenerator"
    ):
        settings_for(Generator(), {})
