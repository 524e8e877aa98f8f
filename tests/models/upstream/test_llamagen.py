"""Loading the published LlamaGen generators: weights, configurations, sampling settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_checks.case import GoldenCase
from tests.golden_checks.llamagen import CHECKS
from vistok.models import upstream
from vistok.models.generators.llamagen import PRESETS, LlamaGenClass, LlamaGenText
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.llamagen import build_model, mlp_dim, sampling_settings, translate_weights

GOLDENS = Path(__file__).parents[2] / "goldens"
SIZES = {  # published name -> layers, width, heads
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "XXXL": (48, 2560, 40),
    "1B": (22, 2048, 32),
    "3B": (24, 3200, 32),
    "7B": (32, 4096, 32),
}


def read_manifest(name: str) -> tuple[dict[str, Tensor], int]:
    """The tensors of a released file, without their values, and the number of its parameters."""
    manifest = json.loads(gzip.decompress((GOLDENS / f"{name}.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    return weights, manifest["num_parameters"]


def published_config(variant: str, sizes: tuple[int, int, int], **more: object) -> dict:
    """The configuration of a manifest such as `c2i-B`."""
    model_type, depth, dim, num_heads = variant.partition("-")[0], *sizes
    length = 1 if model_type == "c2i" else 120
    config = {"model_type": model_type, "n_layer": depth, "dim": dim, "n_head": num_heads}
    return {**config, "cls_token_num": length, **more}


@pytest.mark.parametrize("name", ["c2i_tiny", "t2i_tiny"])
def test_recorded_results_are_reproduced(name: str) -> None:
    case = GoldenCase.read(GOLDENS / "llamagen" / name)
    comparison = CHECKS[case.kind](case)
    assert comparison.failures == []
    assert set(case.expected) <= comparison.names


@pytest.mark.parametrize("variant", ["c2i-B", "c2i-L", "c2i-XL", "c2i-XXL", "c2i-3B", "t2i-XL"])
def test_published_weights_convert_strictly(variant: str) -> None:
    weights, num_parameters = read_manifest(f"llamagen/manifest-{variant}")
    with torch.device("meta"):
        model = build_model(published_config(variant, SIZES[variant.partition("-")[2]]))
    assert isinstance(model, LlamaGenClass if variant.startswith("c2i") else LlamaGenText)
    assert mismatches(model, translate_weights(weights)) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_sizes(name: str) -> None:
    depth, dim, num_heads = SIZES[name]
    sizes = {"depth": depth, "dim": dim, "num_heads": num_heads, "mlp_dim": mlp_dim({"dim": dim})}
    assert PRESETS[name] == sizes


def test_stored_rotary_factors_are_left_out_and_other_extras_are_not() -> None:
    case = GoldenCase.read(GOLDENS / "llamagen" / "c2i_tiny")
    upstream.load("llamagen", case.weights | {"freqs_cis": torch.zeros(26, 10, 2)}, case.config)
    with pytest.raises(ValueError, match=r"1 unexpected \(layers_norm.weight\)"):
        upstream.load("llamagen", case.weights | {"layers_norm.weight": torch.zeros(2)}, case.config)
    missing = {key: tensor for key, tensor in case.weights.items() if key != "output.weight"}
    with pytest.raises(ValueError, match=r"1 missing \(head.weight\)"):
        upstream.load("llamagen", missing, case.config)


def test_a_text_model_without_its_null_text_is_refused() -> None:
    case = GoldenCase.read(GOLDENS / "llamagen" / "t2i_tiny")
    weights = {key: tensor for key, tensor in case.weights.items() if "uncond" not in key}
    with pytest.raises(ValueError, match=r"1 missing \(prefix.null_text\)"):
        upstream.load("llamagen", weights, case.config)


def test_configurations_are_read() -> None:
    config = published_config("c2i-B", (1, 64, 8), block_size=576, vocab_size=100, num_classes=7)
    with torch.device("meta"):
        model = build_model(config | {"n_kv_head": 2, "multiple_of": 16, "ffn_dim_multiplier": 0.5})
    assert (model.codebook_size, model.num_tokens, model.num_classes) == (100, 576, 7)
    assert str(model.layout) == "24x24"
    assert model.blocks[0].attn.qkv.weight.shape == (64 + 2 * 16, 64)
    assert model.config["mlp_dim"] == 96  # int(0.5 * int(8 * 64 / 3)) = 85, up to a multiple of 16
    assert model.config["token_dropout"] == model.config["mlp_dropout"] == 0.1  # as trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t2v"}, "model_type must be 'c2i' or 't2i', got 't2v'"),
        ({"cls_token_num": 2}, "a class is one token, cls_token_num is 2"),
        ({"drop_path_rate": 0.1}, "drop_path_rate is 0.1; it is 0 in all releases"),
        ({"block_size": 250}, "num_tokens 250 does not make a square grid"),
    ],
)
def test_unknown_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model(published_config("c2i-B", (1, 64, 8)) | changes)


def test_incomplete_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="lacks n_layer, n_head"):
        build_model({"dim": 64})


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        (
            {"cfg_scale": 7.5, "top_k": 1000, "top_p": 0.9, "temperature": 0.8},
            {"guidance_scale": 7.5, "guidance_tokens": None, "top_k": 1000, "top_p": 0.9, "temperature": 0.8},
        ),
        (
            {"cfg_scale": 0.5, "cfg_interval": 8, "top_k": 0},
            {"guidance_scale": 1.0, "guidance_tokens": 9, "top_k": None, "top_p": 1.0, "temperature": 1.0},
        ),
    ],
)
def test_published_sampling_settings_become_ours(published: dict, ours: dict) -> None:
    assert sampling_settings(published) == ours
