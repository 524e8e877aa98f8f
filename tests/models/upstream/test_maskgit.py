from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.golden_checks.case import GoldenCase
from tests.golden_checks.maskgit import CHECKS
from vistok.decoding.guidance import make_guidance
from vistok.models import upstream
from vistok.models.generators.maskgit import PRESETS, MaskGITBert, MaskGITUViT
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.maskgit import build_model, sampling_settings, translate_weights

GOLDENS = Path(__file__).parents[2] / "goldens" / "maskgit"
MANIFESTS = {  # published name -> our preset
    "generator_titok_l32": "maskgit-titok-l-32",
    "generator_titok_b64": "maskgit-titok-b-64",
    "generator_titok_s128": "maskgit-titok-s-128",
    "maskgit_one_d_piece_s256": "maskgit-one-d-piece-s-256",
    "maskgit_one_d_piece_b256": "maskgit-one-d-piece-b-256",
    "maskgit_one_d_piece_l256": "maskgit-one-d-piece-l-256",
}
HUB = {  # laid out as the published config.json
    "model": {
        "vq_model": {"codebook_size": 4096, "num_latent_tokens": 32},
        "generator": {
            "model_type": "ViT",
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 3072,
            "image_seq_len": "${model.vq_model.num_latent_tokens}",
            "condition_num_classes": 1000,
            "mask_schedule_strategy": "arccos",
        },
    }
}


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_uvit"])
def test_recorded_results_are_reproduced(name: str) -> None:
    case = GoldenCase.read(GOLDENS / name)
    comparison = CHECKS[case.kind](case)
    assert comparison.failures == []
    assert set(case.expected) <= comparison.names


@pytest.mark.parametrize("published", MANIFESTS)
def test_published_weights_convert_strictly(published: str) -> None:
    manifest = json.loads(gzip.decompress((GOLDENS / f"manifest-{published}.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    kind, sizes = PRESETS[MANIFESTS[published]]
    with torch.device("meta"):
        model = kind(**sizes)
    assert mismatches(model, translate_weights(weights)) == []


def test_stored_position_ids_are_left_out_and_other_extras_are_not() -> None:
    case = GoldenCase.read(GOLDENS / "tiny_vit")
    ids = {"model.embeddings.position_ids": torch.arange(13)[None]}
    upstream.load("maskgit", case.weights | ids, case.config)
    with pytest.raises(ValueError, match=r"1 unexpected \(model.pooler.weight\)"):
        upstream.load("maskgit", case.weights | {"model.pooler.weight": torch.zeros(2)}, case.config)


def test_weights_of_the_other_architecture_are_refused() -> None:
    case = GoldenCase.read(GOLDENS / "tiny_uvit")
    with pytest.raises(ValueError, match="do not fit MaskGITBert"):
        upstream.load("maskgit", case.weights, case.config | {"model_type": "ViT"})


def test_hub_configurations_are_read() -> None:
    with torch.device("meta"):
        model = build_model(HUB)
    assert isinstance(model, MaskGITBert)
    assert (model.num_tokens, model.codebook_size, model.num_classes) == (32, 4096, 1000)


def test_configurations_choose_the_architecture() -> None:
    flat = GoldenCase.read(GOLDENS / "tiny_uvit").config
    assert isinstance(build_model(flat), MaskGITUViT)
    with pytest.raises(ValueError, match="must be 'ViT' or 'UViT', got 'GPT'"):
        build_model(flat | {"model_type": "GPT"})
    with pytest.raises(ValueError, match="lacks hidden_size"):
        build_model({name: value for name, value in flat.items() if name != "hidden_size"})
    with pytest.raises(ValueError, match="no model.generator"):
        build_model({"model": {"vq_model": {}}})


@pytest.mark.parametrize(
    ("published", "first", "last"),
    [
        ({"guidance_scale": 4.5, "guidance_decay": "linear"}, 1.0, 1 + 4.5 * 7 / 8),
        ({"guidance_scale": 4.5, "guidance_decay": "constant"}, 5.5, 5.5),
        ({"guidance_scale": 4.5, "guidance_decay": "power-cosine"}, 1.0, 3.6405),
        ({}, 4.0, 4.0),
    ],
)
def test_published_guidance_scales_become_ours(published: dict, first: float, last: float) -> None:
    settings = sampling_settings(published)
    guidance = make_guidance(
        settings["guidance_schedule"], settings["guidance_scale"], settings["guidance_power"]
    )
    assert guidance.at(0, 8) == pytest.approx(first)
    assert guidance.at(7, 8) == pytest.approx(last, abs=1e-4)
