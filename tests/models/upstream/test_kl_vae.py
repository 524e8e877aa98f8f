from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.golden_checks.case import GoldenCase
from vistok import Layout, Tokens
from vistok.models import upstream
from vistok.models.tokenizers.kl import KL16, KLTokenizer
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.kl_vae import build_model

GOLDENS = Path(__file__).parents[2] / "goldens" / "kl_vae"


def test_published_weights_convert_strictly() -> None:
    manifest = json.loads(gzip.decompress((GOLDENS / "manifest-kl16.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    with torch.device("meta"):
        preset, released = KLTokenizer(**KL16), build_model({})
    ours, theirs = (json.loads(model.to_json_string()) for model in (preset, released))
    names = [name for name in ours if not name.startswith("_")]
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert mismatches(preset, upstream.translate_weights("kl_vae", weights)) == []
    assert sum(parameter.numel() for parameter in preset.parameters()) == manifest["num_parameters"]
    assert str(preset.layout) == "16x16" and preset.scaling_factor == 0.2325


def test_the_usual_autoencoder_lacks_the_encoder_s_attention() -> None:
    case = GoldenCase.read(GOLDENS / "kl_vae_tiny")
    with pytest.raises(ValueError, match=r"5 unexpected|10 unexpected"):
        upstream.load("kl_vae", case.weights, case.config | {"attn_resolutions": []})


def test_the_decoder_counts_its_levels_from_the_end() -> None:
    case = GoldenCase.read(GOLDENS / "kl_vae_tiny")
    ours = upstream.translate_weights("kl_vae", case.weights)
    key = "autoencoder.decoder.up_blocks.{}.resnets.1.conv1.weight"
    for level in range(3):
        theirs = case.weights[f"decoder.up.{level}.block.1.conv1.weight"]
        assert torch.equal(ours[key.format(2 - level)], theirs)


@pytest.mark.parametrize(
    ("places", "encoder", "decoder"),
    [
        ({"attn_resolutions": [16, 8], "decoder_attn_resolutions": [32]}, [1, 2], [0]),
        ({"attn_resolutions": [32], "decoder_attn_resolutions": [8, 16]}, [0], [1, 2]),
        ({"attn_resolutions": [64]}, [], []),
    ],
)
def test_attention_can_be_elsewhere(places: dict, encoder: list[int], decoder: list[int]) -> None:
    model = build_model(GoldenCase.read(GOLDENS / "kl_vae_tiny").config | places)
    assert [model.config["encoder_attention"], model.config["decoder_attention"]] == [encoder, decoder]
    down, up = model.autoencoder.encoder.down_blocks, model.autoencoder.decoder.up_blocks
    assert [i for i, block in enumerate(down) if hasattr(block, "attentions")] == encoder
    assert sorted(2 - i for i, block in enumerate(up) if hasattr(block, "attentions")) == decoder
    published = {  # keys as the release would name them
        f"encoder.down.{level}.attn.0.{part}.weight": torch.zeros(1) for level in encoder for part in "qkv"
    } | {f"decoder.up.{level}.attn.1.{part}.weight": torch.zeros(1) for level in decoder for part in "qkv"}
    levels = {f"decoder.up.{level}.block.0.conv1.weight": torch.zeros(1) for level in range(3)}
    ours = upstream.translate_weights("kl_vae", published | levels)
    assert set(ours) <= set(model.state_dict())


@pytest.mark.parametrize(("name", "value"), [("double_z", False), ("norm_eps", 1e-5), ("out_ch", 4)])
def test_what_was_never_released_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        build_model({name: value})


def test_levels_and_latents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got \[2\]"):
        KLTokenizer(image_size=8, dims=(4, 8), num_groups=2, encoder_attention=(2,))
    model = KLTokenizer(image_size=8, latent_channels=3, dims=(4, 8), depth=1, num_groups=2)
    with pytest.raises(ValueError, match="have 4 channels, this tokenizer decodes 3"):
        model.decode(Tokens(latents=torch.zeros(1, 16, 4), layout=Layout((4, 4))))


@torch.no_grad()
def test_samples_and_modes_survive_saving(tmp_path: Path) -> None:
    case = GoldenCase.read(GOLDENS / "kl_vae_tiny")
    model = upstream.load("kl_vae", case.weights, case.config)
    model.save_pretrained(tmp_path)
    loaded = KLTokenizer.from_pretrained(tmp_path)
    images = case.inputs["image"].clamp(-1, 1)
    for sample in (True, False):
        assert torch.equal(
            loaded.encode(images, sample=sample).data, model.encode(images, sample=sample).data
        )
    spread = (model.encode(images, sample=True).data - model.encode(images).data).abs().max()
    assert spread > 1e-3 and loaded.scaling_factor == 0.2325
