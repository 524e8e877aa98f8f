"""LlamaGen's VQ tokenizers: recorded results, every published tensor, and configurations that were never published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_checks.case import GoldenCase
from tests.golden_checks.llamagen_vq import check
from vistok.models import upstream
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.llamagen_vq import VQ_8, VQ_16, build_model, translate_weights

GOLDENS = Path(__file__).parents[2] / "goldens" / "llamagen"


@pytest.mark.parametrize("name", ["vq_tiny", "vq_tiny_usage"])
def test_recorded_results_are_reproduced(name: str) -> None:
    case = GoldenCase.read(GOLDENS / name)
    comparison = check(case)
    assert comparison.failures == []
    assert set(case.expected) <= comparison.names


def test_a_symmetric_padding_would_be_noticed(monkeypatch) -> None:
    from vistok.models.tokenizers import vqgan

    pad = vqgan.F.pad
    wrong = {(0, 1, 0, 1): (1, 0, 1, 0)}
    monkeypatch.setattr(vqgan.F, "pad", lambda tensor, sides: pad(tensor, wrong.get(tuple(sides), sides)))
    failures = check(GoldenCase.read(GOLDENS / "vq_tiny")).failures
    assert any(failure.startswith("intermediate/encoder_out") for failure in failures)


@pytest.mark.parametrize(("published", "config", "factor"), [("vq-ds16", VQ_16, 16), ("vq-ds8", VQ_8, 8)])
def test_published_weights_convert_strictly(published: str, config: dict, factor: int) -> None:
    manifest = json.loads(gzip.decompress((GOLDENS / f"manifest-{published}.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    with torch.device("meta"):
        model = build_model({**config, "image_size": 384})
    assert mismatches(model, translate_weights(weights)) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["num_parameters"]
    assert (model.downsample_factor, model.num_tokens) == (factor, (384 // factor) ** 2)
    assert (model.codebook_size, model.quantizer.codebook_dim) == (16384, 8)


def test_the_usage_buffer_may_be_absent_and_other_extras_are_refused() -> None:
    case = GoldenCase.read(GOLDENS / "vq_tiny_usage")
    weights: dict[str, Tensor] = dict(case.weights)
    upstream.load("llamagen_vq", weights | {"quantize.codebook_used": torch.zeros(65536)}, case.config)
    weights.pop("quantize.codebook_used")
    upstream.load("llamagen_vq", weights, case.config)
    with pytest.raises(ValueError, match=r"1 unexpected \(quantize.cluster_size\)"):
        upstream.load("llamagen_vq", weights | {"quantize.cluster_size": torch.zeros(1)}, case.config)


def test_both_halves_may_be_named_and_must_agree() -> None:
    sizes = {"ch": 32, "num_res_blocks": 1, "codebook_size": 16, "image_size": 16}
    halves = {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2]}
    assert build_model(sizes | halves).config["dim_mults"] == (1, 2)
    with pytest.raises(ValueError, match=r"one ch_mult .* got \(1, 2\), \(1, 2, 2\)"):
        build_model(sizes | halves | {"decoder_ch_mult": [1, 2, 2]})
    with pytest.raises(ValueError, match="one ch_mult .* got none"):
        build_model(sizes)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="no setting embed_dim; known: .*codebook_embed_dim"):
        build_model({**VQ_16, "embed_dim": 8})
