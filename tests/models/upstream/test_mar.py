"""Loading the published MAR generators: weights, configurations, sampling settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.golden_checks import cspd
from tests.golden_checks.case import GoldenCase
from tests.golden_checks.mar import CHECKS
from vistok.models import upstream
from vistok.models.generators.mar import MAR, PRESETS, SAMPLING
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.mar import build_model, sampling_settings, translate_weights

GOLDENS = Path(__file__).parents[2] / "goldens"
SIZES = {  # published name -> width, depth of each stack, heads, head: blocks, width; guidance scale
    "base": (768, 12, 12, 6, 1024, 2.9),
    "large": (1024, 16, 16, 8, 1280, 3.0),
    "huge": (1280, 20, 16, 12, 1536, 3.2),
}


def published_config(name: str) -> dict:
    dim, depth, num_heads, denoiser_depth, denoiser_dim, _ = SIZES[name]
    stacks = {
        f"{stack}_{key}": value
        for stack in ("encoder", "decoder")
        for key, value in (("embed_dim", dim), ("depth", depth), ("num_heads", num_heads))
    }
    return {**stacks, "diffloss_d": denoiser_depth, "diffloss_w": denoiser_dim}


def test_recorded_results_are_reproduced() -> None:
    for case, checks in (
        (GoldenCase.read(GOLDENS / "mar" / "mar_tiny"), CHECKS),
        (GoldenCase.read(GOLDENS / "cspd" / "cspd_tiny"), cspd.CHECKS),
    ):
        comparison = checks[case.kind](case)
        assert comparison.failures == []
        assert set(case.expected) <= comparison.names


@pytest.mark.parametrize("name", SIZES)
def test_published_weights_convert_strictly(name: str) -> None:
    manifest = json.loads(gzip.decompress((GOLDENS / "mar" / f"manifest-mar_{name}.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    with torch.device("meta"):
        model = build_model(published_config(name))
    assert mismatches(model, translate_weights(weights)) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["num_parameters"]


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        published, preset = build_model(published_config(name)), MAR(**PRESETS[name])
    recorded = [
        {name: one.config[name] for name in one.config if name[0] != "_"} for one in (preset, published)
    ]
    assert recorded[0] == recorded[1]
    assert SAMPLING[name]["guidance_scale"] == SIZES[name][-1]


def test_no_class_is_the_last_class() -> None:
    case = GoldenCase.read(GOLDENS / "mar" / "mar_tiny")
    model = upstream.load("mar", case.weights, case.config)
    assert isinstance(model, MAR)
    assert torch.equal(model.class_embed.weight[model.null_label], case.weights["fake_latent"][0])
    assert not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fake_latent", r"1 missing \(class_embed.weight|1 unexpected|instead of"),
        ("mask_token", r"1 missing \(mask_token\)"),
        ("diffloss.net.res_blocks.1.mlp.2.bias", r"1 missing \(denoiser.blocks.1.fc2.bias\)"),
    ],
)
def test_incomplete_weights_are_refused(change: str, message: str) -> None:
    case = GoldenCase.read(GOLDENS / "mar" / "mar_tiny")
    weights = {key: tensor for key, tensor in case.weights.items() if key != change}
    with pytest.raises(ValueError, match=message):
        upstream.load("mar", weights, case.config)


def test_extra_weights_are_refused() -> None:
    case = GoldenCase.read(GOLDENS / "mar" / "mar_tiny")
    with pytest.raises(ValueError, match=r"1 unexpected \(encoder.blocks.0.attn.rope\)"):
        upstream.load("mar", case.weights | {"encoder_blocks.0.attn.rope": torch.zeros(1)}, case.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, "patch_size must be 1 in MAR, got 2"),
        ({"decoder_embed_dim": 32}, "equally wide: encoder_embed_dim is 768, decoder_embed_dim 32"),
        ({"decoder_num_heads": 6}, "equally wide: encoder_num_heads is 12, decoder_num_heads 6"),
    ],
)
def test_unknown_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(published_config("base") | changes)


def test_published_sampling_settings_become_ours() -> None:
    published = {"num_iter": 256, "num_sampling_steps": "100", "cfg": 2.9, "cfg_schedule": "linear"}
    assert sampling_settings(published) == {
        "num_steps": 256,
        "num_inference_steps": 100,
        "guidance_scale": 2.9,
        "guidance_schedule": "linear",
        "temperature": 1.0,
    }
