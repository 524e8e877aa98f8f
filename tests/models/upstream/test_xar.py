from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.golden_checks.case import GoldenCase
from vistok.models import upstream
from vistok.models.generators.xar import PRESETS, SAMPLING, XAR
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.xar import build_model, sampling_settings
from vistok.order import CellOrder

GOLDENS = Path(__file__).parents[2] / "goldens" / "xar"
SIZES = {"base": (768, 8, 12), "large": (1024, 16, 16), "huge": (1280, 20, 16)}


@pytest.mark.parametrize("name", PRESETS)
def test_published_weights_convert_strictly(name: str) -> None:
    manifest = json.loads(gzip.decompress((GOLDENS / f"manifest-xar_{name}.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    assert "mask" in weights and "decoder_blocks.0.attn.rope.freqs_cos" in weights
    dim, depth, num_heads = SIZES[name]
    config = {"encoder_embed_dim": dim, "decoder_embed_dim": dim, "encoder_num_heads": num_heads}
    config |= {"decoder_num_heads": num_heads, "encoder_depth": depth, "decoder_depth": depth}
    with torch.device("meta"):
        preset, released = XAR(**PRESETS[name]), build_model(config)
    names = [name for name in preset.config if not name.startswith("_")]
    assert [preset.config[name] for name in names] == [released.config[name] for name in names]
    assert mismatches(preset, upstream.translate_weights("xar", weights)) == []
    assert sum(parameter.numel() for parameter in preset.parameters()) == manifest["num_parameters"]


def test_stored_tables_are_left_out_and_other_extras_are_not() -> None:
    case = GoldenCase.read(GOLDENS / "xar_tiny")
    tables = [key for key in case.weights if key == "mask" or ".rope." in key]
    assert len(tables) == 1 + 3 * 3
    without = {key: tensor for key, tensor in case.weights.items() if key not in tables}
    upstream.load("xar", without, case.config)
    with pytest.raises(ValueError, match=r"1 unexpected \(encoder.blocks.0.attn.q_norm.weight\)"):
        extra = {"encoder_blocks.0.attn.q_norm.weight": torch.zeros(1)}
        upstream.load("xar", case.weights | extra, case.config)


def test_the_number_of_classes_is_that_of_imagenet_whatever_is_configured() -> None:
    with torch.device("meta"):
        model = build_model({"class_num": 10})
    assert (model.num_classes, model.null_label) == (1000, 1000)
    assert model.order == CellOrder(256, (16, 16), 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 2}, "patch_size must be 1"),
        ({"clusters": 16}, "clusters must be 4"),
        ({"img_size": 512}, "make 32 x 32"),
        ({"encoder_embed_dim": 64, "decoder_embed_dim": 32}, "equally wide"),
    ],
)
def test_what_was_never_released_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(config)


@pytest.mark.parametrize("name", SAMPLING)
def test_published_settings_become_ours(name: str) -> None:
    ours = SAMPLING[name]
    published = {"flow_steps": ours["num_inference_steps"], "cfg": ours["guidance_scale"]}
    assert sampling_settings(published) == ours | {"guidance_schedule": "ramp"}
