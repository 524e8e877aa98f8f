"""Behaviour that TiTok, its VAE and the MaskGIT-VQGAN share, and what is special to each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.maskgit_vqgan import MaskGITVQGAN, VQGANResidualBlock
from vistok.models.tokenizers.titok import MixingLinear, TiTok, TiTokVAE
from vistok.tokens import Tokens

TRANSFORMER = {
    "image_size": 16,
    "num_tokens": 5,
    "encoder_patch_size": 8,
    "encoder_dim": 24,
    "encoder_depth": 1,
    "encoder_num_heads": 3,
    "decoder_patch_size": 4,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
CODES = {"codebook_size": 20, "codebook_dim": 6}
PIXELS = {
    "pixel_codebook_size": 11,
    "pixel_codebook_dim": 7,
    "pixel_dim": 32,
    "pixel_dim_mults": (1, 2, 1),
    "pixel_depth": 1,
}


def two_stage() -> TiTok:
    return TiTok(**TRANSFORMER, **CODES, **PIXELS)


def single_stage() -> TiTok:
    return TiTok(**TRANSFORMER, **CODES, use_l2_norm=False)


def vae() -> TiTokVAE:
    return TiTokVAE(**TRANSFORMER, latent_dim=6)


def vqgan() -> MaskGITVQGAN:
    return MaskGITVQGAN(image_size=16, dim=32, dim_mults=(2, 1), depth=1, **CODES)


MAKERS = [two_stage, single_stage, vae, vqgan]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> ImageTokenizer:
    torch.manual_seed(0)
    model = request.param().eval()
    for parameter in model.parameters():  # fresh biases are zero and would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def encode(model: ImageTokenizer, images: Tensor) -> Tokens:
    return model.encode(images, sample=False) if isinstance(model, TiTokVAE) else model.encode(images)


@torch.no_grad()
def test_images_to_tokens_and_back(model: ImageTokenizer, images: Tensor) -> None:
    tokens = encode(model, images)
    assert tokens.data.shape[:2] == (3, model.num_tokens)
    assert tokens.layout == model.layout and tokens.codebook_size == model.codebook_size
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    alone = model.decode(encode(model, images[1:2]))
    torch.testing.assert_close(alone, decoded[1:2], atol=1e-4, rtol=0)  # apart from the order of additions


@torch.no_grad()
def test_saved_models_come_back_exactly(model: ImageTokenizer, images: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    tokens = encode(model, images)
    assert torch.equal(encode(loaded, images).data, tokens.data)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


@torch.no_grad()
def test_bfloat16_decodes_the_same_picture(model: ImageTokenizer, images: Tensor) -> None:
    tokens = encode(model, images)
    expected = model.decode(tokens)
    decoded = model.to(torch.bfloat16).decode(tokens)
    assert decoded.dtype == torch.bfloat16
    assert encode(model, images).data.shape == tokens.data.shape
    assert (decoded.float() - expected).abs().mean() < 0.02  # bf16 keeps 8 bits; the pictures span [-1, 1]


@pytest.mark.parametrize("make", [two_stage, single_stage, vae])
def test_gradients_reach_every_parameter(make, images: Tensor) -> None:
    torch.manual_seed(0)
    model = make()
    reconstruction, extra = model(images)
    loss = (reconstruction - images).square().mean()
    (loss + (extra.kl().mean() if isinstance(model, TiTokVAE) else extra.loss)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_reconstruction_gradients_pass_straight_through_the_codes(images: Tensor) -> None:
    model = single_stage()
    reconstruction, _ = model(images)
    reconstruction.square().mean().backward()
    assert model.encoder.patch_embed.weight.grad is not None and model.encoder.patch_embed.weight.grad.any()
    assert model.quantizer.embedding.weight.grad is None or not model.quantizer.embedding.weight.grad.any()


@torch.no_grad()
def test_vae_draws_from_the_generator_alone(images: Tensor) -> None:
    model = vae()
    first, again, other = (
        model.encode(images, generator=torch.Generator().manual_seed(seed)).data for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    posterior = model.posterior(images)
    noise = torch.randn(
        3, 6, 1, 5, generator=torch.Generator().manual_seed(0)
    )  # the published layout and order
    torch.testing.assert_close(first, posterior.sample(noise[:, :, 0].mT))
    assert torch.equal(model.encode(images, sample=False).data, posterior.mean)


def test_first_releases_mix_values_of_several_tokens() -> None:
    layer = MixingLinear(3, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 0)
    layer.weight.data[0, 1] = 1
    hidden_states = torch.arange(6.0).reshape(1, 2, 3)  # two tokens of width 3: memory 0..5
    assert layer(hidden_states).flatten().tolist() == [2, 3]  # row 1 of the memory read as [3 2]


def test_shortcut_of_the_pixel_decoder_ignores_the_input() -> None:
    block = VQGANResidualBlock(32, 64)
    torch.nn.init.zeros_(block.conv2.weight)
    assert not block(torch.randn(1, 32, 4, 4)).any()
    same = VQGANResidualBlock(32, 32)
    torch.nn.init.zeros_(same.conv2.weight)
    hidden_states = torch.randn(1, 32, 4, 4)
    assert torch.equal(same(hidden_states), hidden_states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_patch_size": 5}, "not a multiple of the patch size 5"),
        ({"encoder_num_heads": 5}, "not a multiple of num_heads 5"),
        ({"pixel_dim_mults": (1, 1)}, "decoder_patch_size 4 needs a pixel decoder that enlarges as much"),
        ({"pixel_dim": 20}, "dim 20 is not a multiple of 32"),
    ],
)
def test_sizes_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiTok(**{**TRANSFORMER, **CODES, **PIXELS, **change})


def test_bad_calls_are_explained(model: ImageTokenizer, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes images \[b 3 16 16\]"):
        encode(model, images[..., :8])
    with pytest.raises(ValueError, match="always uses"):
        model.encode(images, num_tokens=2)
    with torch.no_grad():
        tokens = encode(model, images)
    with pytest.raises(ValueError, match="decodes exactly"):
        model.decode(tokens.keep(2))
