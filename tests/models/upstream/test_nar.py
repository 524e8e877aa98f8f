"""Loading the published NAR generators: weights, configurations, sampling settings."""

from __future__ import annotations

import pytest
import torch

from tests.golden_checks.case import GoldenCase
from tests.golden_checks.nar import CHECKS
from tests.models.upstream.test_llamagen import GOLDENS, SIZES, published_config, read_manifest
from vistok.models import upstream
from vistok.models.generators.nar import PRESETS, NARClass, NARText
from vistok.models.upstream import llamagen
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.llamagen import mlp_dim
from vistok.models.upstream.nar import build_model, sampling_settings, translate_weights
from vistok.order import DiagonalOrder, RasterOrder

NAR_SIZES = {**{name: SIZES[name] for name in ("B", "L", "XL", "XXL")}, "M": (18, 1024, 16)}


@pytest.mark.parametrize("name", ["c2i_tiny", "t2i_tiny"])
def test_recorded_results_are_reproduced(name: str) -> None:
    case = GoldenCase.read(GOLDENS / "nar" / name)
    comparison = CHECKS[case.kind](case)
    assert comparison.failures == []
    assert set(case.expected) <= comparison.names


@pytest.mark.parametrize("variant", ["c2i-B", "c2i-M", "c2i-L", "c2i-XL", "c2i-XXL", "t2i-XL"])
def test_published_weights_convert_strictly(variant: str) -> None:
    weights, num_parameters = read_manifest(f"nar/manifest-{variant}")
    config = published_config(variant, NAR_SIZES[variant.partition("-")[2]], medusa_attention_num=1)
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, NARClass if variant.startswith("c2i") else NARText)
    assert mismatches(model, translate_weights(weights)) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_presets_are_the_published_sizes() -> None:
    assert {
        name: {"depth": depth, "dim": dim, "num_heads": num_heads, "mlp_dim": mlp_dim({"dim": dim})}
        for name, (depth, dim, num_heads) in NAR_SIZES.items()
    } == PRESETS


def test_weights_of_the_other_family_are_refused() -> None:
    nar, other = (GoldenCase.read(GOLDENS / system / "c2i_tiny") for system in ("nar", "llamagen"))
    with pytest.raises(ValueError, match="do not fit NARClass: .*missing"):
        upstream.load("nar", other.weights, nar.config)
    with pytest.raises(ValueError, match="do not fit LlamaGenClass: .*unexpected"):
        upstream.load("llamagen", nar.weights, other.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t2v"}, "model_type must be 'c2i' or 't2i', got 't2v'"),
        ({"medusa_attention_num": 2}, "medusa_attention_num is 2; all releases for images have 1"),
    ],
)
def test_unknown_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model(published_config("c2i-B", (1, 64, 8)) | changes)


def test_guidance_intervals_count_tokens_here_and_steps_in_llamagen() -> None:
    published = {"cfg_scale": 4.0, "cfg_interval": 8, "top_k": 20}
    settings = sampling_settings(published)
    assert settings == llamagen.sampling_settings(published) | {"guidance_tokens": 8}
    # 0, 1, 3 and 6 tokens are not more than 8
    assert DiagonalOrder(25, (5, 5)).num_steps_within(settings["guidance_tokens"]) == 4
    # the first token, and those that steps 0 to 8 make
    interval = llamagen.sampling_settings(published)["guidance_tokens"]
    assert RasterOrder(25).num_steps_within(interval) == 10
    assert sampling_settings({"cfg_scale": 4.0})["guidance_tokens"] is None
