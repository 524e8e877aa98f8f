"""Loading the published TiTok tokenizers: configurations and what is wrong with weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_checks.case import GoldenCase
from vistok.models import upstream
from vistok.models.tokenizers.titok import TiTok
from vistok.models.upstream.releases import RELEASES

GOLDENS = Path(__file__).parents[2] / "goldens" / "titok"
HUB_CONFIG = {
    "experiment": {"project": "x"},
    "model": {
        "vq_model": {
            "codebook_size": 4096,
            "token_size": 12,
            "use_l2_norm": True,
            "commitment_cost": 0.25,
            "vit_enc_model_size": "small",
            "vit_dec_model_size": "small",
            "vit_enc_patch_size": 16,
            "vit_dec_patch_size": 16,
            "num_latent_tokens": 128,
        },
        "generator": {"image_seq_len": "${model.vq_model.num_latent_tokens}"},
    },
    "dataset": {"preprocessing": {"crop_size": 256}},
}


@pytest.fixture(scope="module")
def two_stage() -> GoldenCase:
    return GoldenCase.read(GOLDENS / "tiny_vq_two_stage")


def test_hub_config_without_kind_is_two_stage_vq() -> None:
    with torch.device("meta"):
        model = upstream.build_model("titok", HUB_CONFIG)
        release = upstream.build_model("titok", RELEASES["titok-s-128"].config)
    assert isinstance(model, TiTok)
    assert dict(model.config) == dict(release.config)


def test_references_in_hub_configs_are_resolved() -> None:
    config = copy.deepcopy(HUB_CONFIG)
    config["model"]["vq_model"]["num_latent_tokens"] = "${experiment.tokens}"
    config["experiment"]["tokens"] = 7
    with torch.device("meta"):
        assert upstream.build_model("titok", config).num_tokens == 7
    config["experiment"].pop("tokens")
    with pytest.raises(ValueError, match=r"\$\{experiment.tokens\}, which it does not have"):
        upstream.build_model("titok", config)
    config["experiment"]["tokens"] = "${model.vq_model.num_latent_tokens}"
    with pytest.raises(ValueError, match="refers to itself"):
        upstream.build_model("titok", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize_mode": "fsq"}, "'vq' or 'vae', got 'fsq'"),
        ({"is_legacy": False}, "none of the released kinds"),
        ({"finetune_decoder": False}, "no pixel decoder"),
        ({"vit_dec_model_size": "huge"}, "vit_dec_model_size is 'huge', not one of small, base, large"),
        ({"codebook_size": None}, "lacks 'codebook_size'"),
    ],
)
def test_unknown_configurations_are_refused(changes: dict, message: str) -> None:
    config = copy.deepcopy(HUB_CONFIG)
    vq_model = config["model"]["vq_model"] | changes
    config["model"]["vq_model"] = {name: value for name, value in vq_model.items() if value is not None}
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        upstream.build_model("titok", config)


def _renamed(weights: dict[str, Tensor]) -> None:
    weights["encoder.ln_before.weight"] = weights.pop("encoder.ln_pre.weight")


def _missing(weights: dict[str, Tensor]) -> None:
    del weights["pixel_decoder.conv_in.weight"]


def _reshaped(weights: dict[str, Tensor]) -> None:
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"][:-1]


def _integers(weights: dict[str, Tensor]) -> None:
    weights["latent_tokens"] = weights["latent_tokens"].long()


def _twice(weights: dict[str, Tensor]) -> None:
    weights["encoder.latent_tokens"] = weights["latent_tokens"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_renamed, r"1 missing \(encoder.norm_in.weight\); 1 unexpected \(encoder.ln_before.weight\)"),
        (_missing, r"1 missing \(pixel_decoder.decoder.conv_in.weight\)"),
        (_reshaped, r"quantizer.embedding.weight \[63, 6\] instead of \[64, 6\]"),
        (_integers, r"1 not floating point \(encoder.latent_tokens\)"),
        (_twice, "both latent_tokens and encoder.latent_tokens"),
    ],
)
def test_wrong_weights_are_named(two_stage: GoldenCase, damage, message: str) -> None:
    weights = dict(two_stage.weights)
    damage(weights)
    with pytest.raises(ValueError, match=message):
        upstream.load("titok", weights, two_stage.config)


def test_unknown_system_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'titok'"):
        upstream.load("titoc", {}, {})
