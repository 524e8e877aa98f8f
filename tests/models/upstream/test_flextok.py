"""Loading the published FlexTok: the stored configuration as data, whatever it says, and the files of the hub."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vistok
from tests.golden_checks.case import GoldenCase
from vistok.models import upstream
from vistok.models.tokenizers import flextok, kl
from vistok.models.tokenizers.flextok import FlexTok
from vistok.models.upstream import flextok_config
from vistok.models.upstream.flextok_config import read_tree
from vistok.models.upstream.flextok_tree import MAX_TEXT
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.releases import RELEASES

GOLDENS = Path(__file__).parents[2] / "goldens" / "flextok"
TINY_VAE = {"vae_dims": (8, 8, 16, 16), "vae_depth": 1, "vae_num_groups": 4}  # of the golden


@pytest.fixture
def tree() -> dict[str, Any]:
    return json.loads((GOLDENS / "sample_config.json").read_text())


@pytest.fixture(scope="module")
def golden() -> GoldenCase:
    return GoldenCase.read(GOLDENS / "flextok_tiny")


@pytest.fixture
def tiny_vae(monkeypatch) -> None:
    """Trees say nothing of the sizes of the autoencoder; the golden's is smaller than the released ones."""
    for name, value in TINY_VAE.items():
        monkeypatch.setitem(flextok_config.RELEASED_VAE, name, value)


def header(tree: dict[str, Any]) -> dict[str, str]:
    """The tree as the header of a weights file holds it: one string per part, in Python's notation."""
    target = {"_target_": "flextok.flextok_wrapper.FlexTok", "format": "pt"}
    return target | {name: repr(part) for name, part in tree.items()}


def test_both_stored_forms_say_the_same(tree: dict[str, Any]) -> None:
    arguments = read_tree(tree)
    assert arguments == read_tree(header(tree)) == read_tree({"config": tree})
    expected = {
        "image_size": 64,
        "num_tokens": 16,
        "levels": (8, 8, 8, 5, 5, 5),
        "latent_patch_size": 2,
        "encoder_dim": 64,
        "encoder_depth": 2,
        "decoder_dim": 48,
        "decoder_depth": 3,
        "head_dim": 16,
        "max_timestep": 1.0,
        "latent_channels": 4,
        "scaling_factor": 0.7,
        "sample_posterior": False,
        "learned_null": True,
    }
    assert {name: arguments[name] for name in expected} == expected


def test_order_of_stages_means_nothing(tree: dict[str, Any]) -> None:
    """Hub tools sort the keys of a configuration; the program that made it cannot read it any more then."""
    assert read_tree(json.loads(json.dumps(tree, sort_keys=True))) == read_tree(tree)


def test_the_tree_describes_the_weights(tree: dict[str, Any], golden: GoldenCase, tiny_vae: None) -> None:
    with torch.device("meta"):
        model = upstream.build_model("flextok", tree)
    assert mismatches(model, upstream.translate_weights("flextok", golden.weights)) == []


def test_zero_null_condition(tree: dict[str, Any]) -> None:
    stage = tree["decoder"]["module_dict"]["dec_latent_dropout"]
    stage["_target_"] = "flextok.model.preprocessors.nullcond.ZeroNullCond"
    assert read_tree(tree)["learned_null"] is False


def test_missing_values_are_the_class_defaults(tree: dict[str, Any]) -> None:
    del tree["vae"]["sample_posterior"]
    del tree["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"]
    for side, stage in (("encoder", "enc_transformer"), ("decoder", "dec_transformer")):
        del tree[side]["module_dict"][stage]["head_dim"]
    arguments = read_tree(tree)
    names = ("sample_posterior", "max_timestep", "head_dim")
    assert [arguments[name] for name in names] == [True, 1000.0, 64]


def stage(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return tree["encoder" if name.startswith("enc") else "decoder"]["module_dict"][name]


def setting(place: Callable[[dict], dict], **values: object) -> Callable[[dict], None]:
    """A damage: put `values` into the node at `place`."""
    return lambda tree: place(tree).update(values)


EVIL = [
    setting(lambda t: t["vae"], _target_="os.system"),
    setting(lambda t: t["vae"], _target_="flextok.os.system"),
    setting(lambda t: t["vae"], _target_="evil.StableDiffusionVAE"),
    setting(lambda t: t["vae"], _target_=["os", "system"]),
    setting(lambda t: t["encoder"], _target_="flextok.regularizers.quantize_fsq.FSQ"),
    setting(lambda t: t, _target_="builtins.eval"),
    setting(lambda t: t, _args_=["true"]),
    setting(lambda t: t["regularizer"], hook={"_target_": "os.system"}),
    setting(lambda t: t["regularizer"], hooks=[{"deep": [{"_target_": "os.system"}]}]),
    setting(lambda t: t["regularizer"], _args_=["true"]),
    setting(lambda t: t["pipeline"], _recursive_=False),
    setting(lambda t: t["pipeline"], _convert_="all"),
    setting(lambda t: t["pipeline"], _partial_="yes"),
    setting(lambda t: t["regularizer"], _partial_=True),
    setting(lambda t: stage(t, "enc_transformer"), _partial_=True),
    setting(
        lambda t: stage(t, "enc_transformer"), act_layer={"_target_": "torch.nn.SiLU", "_partial_": True}
    ),
    setting(
        lambda t: stage(t, "enc_channels_to_last"), per_sample_op={"_target_": "os.abort", "_partial_": True}
    ),
    setting(lambda t: stage(t, "enc_channels_to_last"), per_sample_op="os.abort"),
    setting(lambda t: t["encoder"]["module_dict"], extra={"_target_": "os.system"}),
    setting(
        lambda t: t["encoder"]["module_dict"], extra={"_target_": "flextok.regularizers.quantize_fsq.FSQ"}
    ),
]


@pytest.fixture
def trap(monkeypatch) -> list:
    """Calls of what the malicious trees name; stays empty."""
    calls: list = []
    for name in ("system", "abort"):
        monkeypatch.setattr(os, name, lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize("damage", EVIL)
@pytest.mark.parametrize("store", [dict, header], ids=["json", "header"])
def test_foreign_classes_and_directives_are_refused(tree: dict[str, Any], damage, store, trap: list) -> None:
    damage(tree)
    with pytest.raises(ValueError, match="refused"):
        read_tree(store(tree))
    assert trap == []


def test_further_entries_mean_nothing_if_they_are_text(tree: dict[str, Any]) -> None:
    assert read_tree(header(tree) | {"hook": "{'_target_': 'os.system'}"}) == read_tree(tree)
    with pytest.raises(ValueError, match="holds 'hook', which has no place there: refused"):
        read_tree(tree | {"hook": {"_target_": "os.system"}})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "{'_target_': __import__('os')}",
        "{'_target_': 'flextok.x.FSQ', 'levels': [8 for _ in range(9)]}",
        "{" * 5000,
        "[" * 200 + "]" * 200,
        "{'levels': " + "9" * 5000 + "}",
        "{'levels': {1, 2}, '_target_': 'flextok.x.FSQ'}",
        "{'levels': 2j, '_target_': 'flextok.x.FSQ'}",
        "{'levels': b'8', '_target_': 'flextok.x.FSQ'}",
        "{1: 2, '_target_': 'flextok.x.FSQ'}",
        "'_target_'",
        " " * (MAX_TEXT + 1),
        "_target_",
    ],
    ids=lambda text: text[:24],
)
def test_header_strings_are_literals_of_bounded_size(tree: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="refused|must be a mapping"):
        read_tree(header(tree) | {"regularizer": text})


def deep(tree: dict[str, Any]) -> None:
    node = tree["vae"]
    for _ in range(40):
        node["inner"] = {}
        node = node["inner"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("vae"), "lacks 'vae'"),
        (lambda t: t["vae"].pop("scaling_factor"), "scaling_factor .* must be a positive number, got None"),
        (setting(lambda t: t["vae"], scaling_factor=float("nan")), "must be a positive number"),
        (setting(lambda t: t["vae"], scaling_factor=True), "must be a positive number"),
        (
            setting(lambda t: t["vae"], latent_channels=8),
            r"different values for the number of latent channels",
        ),
        (setting(lambda t: t["vae"], sample_posterior="yes"), "sample_posterior .* must be true or false"),
        (setting(lambda t: t["regularizer"], levels=[10**6] * 6), "codebook .* refused"),
        (setting(lambda t: t["regularizer"], levels=[8] * 100), "must be a list of integers"),
        (setting(lambda t: stage(t, "enc_transformer"), depth=10**12), r"depth .* in 1..256"),
        (setting(lambda t: stage(t, "dec_transformer"), dim=2**40), r"dim .* in 1..16384"),
        (setting(lambda t: stage(t, "dec_transformer"), dim=48.0), r"dim .* must be an integer"),
        (setting(lambda t: stage(t, "dec_transformer"), head_dim=8), "different values for head_dim"),
        (setting(lambda t: stage(t, "enc_register_module"), n_max=10**9), r"n_max .* in 1..65536"),
        (
            setting(lambda t: stage(t, "enc_register_module"), n_min=1),
            "different values for the number of registers",
        ),
        (
            setting(lambda t: stage(t, "enc_posemb_module"), max_sizes=[4, 5]),
            "different values for max_sizes",
        ),
        (
            setting(lambda t: stage(t, "enc_posemb_module"), posemb_scaling="interpolate"),
            "must be 'absolute'",
        ),
        (setting(lambda t: stage(t, "enc_seq_packer"), mask_mode="full"), "mask_mode must be 'causal_last'"),
        (setting(lambda t: stage(t, "dec_transformer"), adaLN_expansion=1), "adaLN_expansion must be 2"),
        (
            setting(lambda t: stage(t, "dec_to_patches"), use_mup_readout=True),
            "use_mup_readout must be False",
        ),
        (
            lambda t: t["decoder"]["module_dict"].pop("dec_time_embedder"),
            "lacks the stage 'dec_time_embedder'",
        ),
        (lambda t: t["decoder"].pop("module_dict"), "no module_dict"),
        (deep, "too large or too deep"),
        (setting(lambda t: t["vae"], junk=[0] * 20_000), "too large or too deep"),
    ],
)
def test_values_out_of_bounds_are_named(tree: dict[str, Any], damage, message: str) -> None:
    damage(tree)
    with pytest.raises(ValueError, match=message):
        read_tree(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "activation must be 'silu'"),
        ({"adaLN_expansion": 1}, "adaLN_expansion must be 2"),
        ({"norm_affine": True}, "norm_affine must be False"),
        ({"attention_scale": 0.25}, "attention_scale must be 0.5 with these sizes, got 0.25"),
        ({"vae_down_factor": 16}, "vae_down_factor must be 8"),
        ({"null_condition": "none"}, "'learned' or 'zero', got 'none'"),
    ],
)
def test_unknown_flat_configurations_are_refused(golden: GoldenCase, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        upstream.build_model("flextok", golden.config | changes)


@pytest.fixture
def published(tree: dict[str, Any], golden: GoldenCase, tmp_path: Path, tiny_vae: None) -> Path:
    """A folder as on the hub: the configuration twice, and the weights."""
    save_file(golden.weights, tmp_path / "model.safetensors", metadata=header(tree))
    (tmp_path / "config.json").write_text(json.dumps(tree, sort_keys=True))
    return tmp_path


@torch.no_grad()
def test_a_published_checkpoint_loads(published: Path, golden: GoldenCase) -> None:
    expected = golden.outputs["token_ids"]
    folder = vistok.load(published)
    assert isinstance(folder, FlexTok) and not folder.training
    assert torch.equal(folder.encode(golden.inputs["images"]).data, expected)
    alone = vistok.load(published / "model.safetensors")
    (published / "config.json").unlink()
    without_json = vistok.load(published)
    for other in (alone, without_json):
        assert dict(other.config) == dict(folder.config)
        assert torch.equal(other.state_dict()["decoder.positions"], folder.state_dict()["decoder.positions"])


def test_our_copy_of_a_published_checkpoint(published: Path, golden: GoldenCase, tmp_path: Path) -> None:
    model = vistok.load(published)
    model.save_pretrained(tmp_path / "ours")
    loaded = vistok.load(tmp_path / "ours")
    assert isinstance(loaded, FlexTok)
    tokens = model.encode(golden.inputs["images"], num_tokens=[3, 16])
    images = model.decode(tokens, num_inference_steps=2)
    assert torch.equal(loaded.decode(tokens, num_inference_steps=2), images)


def test_weights_without_configuration_say_what_is_missing(monkeypatch, tmp_path: Path) -> None:
    release = RELEASES["flextok-d12-d12-in1k"]
    monkeypatch.setattr("vistok.hub.possible_releases", lambda weights, file_name: [release])
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="put the official config.json beside it"):
        vistok.load(tmp_path / "model.safetensors")


def test_malicious_checkpoints_are_refused_before_the_model_is_built(
    tree: dict[str, Any], tmp_path: Path, monkeypatch, trap: list
) -> None:
    monkeypatch.setattr("vistok.models.upstream.flextok.FlexTok", lambda **arguments: trap.append(arguments))
    tree["regularizer"]["_target_"] = "os.system"
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata=header(tree))
    with pytest.raises(ValueError, match=r"regularizer._target_ names 'os.system'.*refused"):
        vistok.load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"regularizer._target_ names 'os.system'.*refused"):
        vistok.load(tmp_path)
    assert trap == []


def test_published_autoencoder_loads(tmp_path: Path) -> None:
    case = GoldenCase.read(GOLDENS / "vae_tiny")
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": case.config["block_out_channels"],
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.7,
        "shift_factor": None,
    }
    save_file(case.weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = vistok.load(tmp_path)
    assert isinstance(model, kl.KLTokenizer) and model.scaling_factor == 0.7
    (tmp_path / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    with pytest.raises(ValueError, match="shift_factor must be None"):
        vistok.load(tmp_path)


@pytest.mark.parametrize("name", [*flextok.PRESETS, *kl.PRESETS])
def test_presets_are_the_releases(name: str) -> None:
    model_class, arguments = (flextok.PRESETS | kl.PRESETS)[name]
    with torch.device("meta"):
        released = upstream.build_model(RELEASES[name].system, RELEASES[name].config)
        preset = model_class(**arguments)
    assert type(released) is model_class
    names = [name for name in preset.config if not name.startswith("_")]
    assert [released.config[name] for name in names] == [preset.config[name] for name in names]


def _damaged(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    weights = copy.copy(weights)
    del weights[key]
    return weights


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "encoder.module_dict.enc_transformer.blocks.1.attn.wk.weight",
            r"1 missing \(encoder.blocks.1.attn.qkv",
        ),
        ("decoder.module_dict.dec_latent_dropout.nullcond", r"1 missing \(decoder.learned_null\)"),
        ("vae.vae.quant_conv.bias", r"1 missing \(vae.autoencoder.quant_conv.bias\)"),
    ],
)
def test_missing_weights_are_named(golden: GoldenCase, key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upstream.load("flextok", _damaged(golden.weights, key), golden.config)
