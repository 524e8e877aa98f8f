"""Loading published FlexAR generators: the tree of their configuration is data, and never run."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch

from tests.golden_checks.case import GoldenCase
from vistok.models import upstream
from vistok.models.generators.flex_ar import FlexARText
from vistok.models.tokenizers.flextok import FlexTok
from vistok.models.upstream.flextok_ar import sampling_settings, tokenizer_hub_id

GOLDENS = Path(__file__).parents[2] / "goldens" / "flextok"
NORM = {"_target_": "l3m.model.layers.normalization.RMSNorm", "_partial_": True, "eps": 1e-6}
TRUNK = {
    "read_key": "input_embeddings",
    "embed_dim": "${model.width}",
    "num_blocks": 2,
    "mlp_ratio": 4,
    "use_bias": False,
    "post_trunk_norm": True,
    "norm_layer": NORM,
    "ffn_target": {"_target_": "l3m.model.layers.ffn.SwiGLUFFN", "_partial_": True, "multiple_of": 32},
}
PREPROCESSOR = {
    "_target_": "flextok_ar.model.preprocessors.ARImageEmbedPreprocessor",
    "token_grid_size": [12, 1],
    "codebook_size": 200,
    "embed_dim": 48,
    "pos_embed_type": "absolute",
}
HEAD = {
    "_target_": "l3m.model.heads.classifier.LinearClassifier",
    "in_features": 48,
    "out_features": 200,
    "use_bias": False,
}


def attention(kind: str, **more: object) -> dict:
    path = {
        "EfficientAttention": "l3m.model.layers.attention",
        "GeneralizedAttentionWithMask": "flextok_ar.model.attention",
    }
    plain = {"_target_": f"{path[kind]}.{kind}", "_partial_": True, "dim": 48, "num_heads": 3}
    return plain | more


def in_tree(trunk: dict, preprocessor: dict, **parts: dict) -> dict:
    image_model = {
        "_target_": "l3m.model.meta_models.MetaModel",
        "preprocessor": preprocessor,
        "trunk": trunk,
        "postprocessor": {"_target_": "torch.nn.Identity"},
        "head": HEAD,
    }
    meta_model = {
        "_target_": "l3m.model.meta_models.InSeriesMetaModels",
        "models": {**parts, "ar_image_model": image_model},
    }
    return copy.deepcopy({"model": {"width": 48, "meta_model": meta_model}, "generation": {"top_k": 0}})


def class_tree() -> dict:
    trunk = TRUNK | {
        "_target_": "l3m.model.trunks.transformer.Transformer",
        "attn_target": attention("EfficientAttention", is_causal=True),
    }
    return in_tree(trunk, PREPROCESSOR | {"num_classes": 10, "cond_dropout_prob": 0.1})


def text_tree() -> dict:
    trunk = TRUNK | {
        "_target_": "l3m.model.trunks.transformer_decoder.TransformerDecoder",
        "self_attn_target": attention("EfficientAttention", is_causal=True, qk_norm=NORM),
        "cross_attn_target": attention("GeneralizedAttentionWithMask", encoder_dim=48, qk_norm=NORM),
    }
    text_encoder = {
        "_target_": "flextok_ar.model.text_encoder.T5EmbedderWithMLP",
        "t5_embedder": {
            "_target_": "flextok_ar.model.text_encoder.T5Embedder",
            "hf_hub_path": "google/flan-t5-xl",
            "encoder_seqlen_max": 120,
        },
        "mlp": {
            "_target_": "flextok_ar.model.text_encoder.TextToEmbedMLP",
            "text_dim": 20,
            "embed_dim": 48,
            "act_layer": {"_target_": "torch.nn.GELU", "_partial_": True, "approximate": "tanh"},
        },
    }
    tokenizer = {
        "_target_": "flextok_ar.model.integration.ImageResamplerTokenizer",
        "model_id": "EPFL-VILAB/flextok_d18_d28_dfn",
    }
    return in_tree(trunk, PREPROCESSOR, image_tokenizer=tokenizer, text_encoder=text_encoder)


TREES = {"ar_c2i_tiny": class_tree, "ar_t2i_tiny": text_tree}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_and_a_flat_configuration_describe_the_same_model(name: str) -> None:
    case = GoldenCase.read(GOLDENS / name)
    flat = upstream.load("flextok_ar", case.weights, case.config)
    tree = upstream.load("flextok_ar", case.weights, TREES[name]())
    same = [key for key in flat.config if not key.startswith("_") and key != "max_text_length"]
    assert {key: tree.config[key] for key in same} == {key: flat.config[key] for key in same}
    assert upstream.system_of_config(TREES[name]()) == "flextok_ar"


def test_a_text_tree_names_encoder_and_tokenizer() -> None:
    with torch.device("meta"):
        model = upstream.build_model("flextok_ar", text_tree())
    assert isinstance(model, FlexARText)
    assert (model.config["text_encoder"], model.config["max_text_length"]) == ("google/flan-t5-xl", 120)
    assert tokenizer_hub_id(text_tree()) == "EPFL-VILAB/flextok_d18_d28_dfn"
    assert tokenizer_hub_id(class_tree()) is None


def test_parts_with_releases_of_their_own_are_left_out_and_other_extras_are_not() -> None:
    case = GoldenCase.read(GOLDENS / "ar_t2i_tiny")
    extra = {
        "models.image_tokenizer.flextok_model.x": torch.zeros(1),
        "models.text_encoder.t5_embedder.model.x": torch.zeros(1),
    }
    upstream.load("flextok_ar", case.weights | extra, case.config)
    with pytest.raises(ValueError, match=r"1 unexpected \(models.drafter.weight\)"):
        upstream.load("flextok_ar", case.weights | {"models.drafter.weight": torch.zeros(1)}, case.config)


PLACES = [
    (),
    ("models", "ar_image_model", "head"),
    ("models", "ar_image_model", "trunk", "norm_layer"),
    ("models", "image_tokenizer"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.Popen", "evil.MetaModel", "l3m.evil.Backdoor", 7]
)
def test_a_foreign_class_is_refused_and_not_run(monkeypatch, tmp_path, place: tuple, target) -> None:
    def must_not_run(*args: object) -> None:
        raise AssertionError("a name of the file was run")

    monkeypatch.setattr("os.system", must_not_run)
    monkeypatch.setattr("subprocess.Popen", must_not_run)
    tree = text_tree()
    node = tree["model"]["meta_model"]
    for name in place:
        node = node[name]
    node |= {"_target_": target, "command": f"touch {tmp_path / 'ran'}"}
    with pytest.raises(ValueError, match=f"names '{target}', which is no part of a published FlexAR"):
        upstream.build_model("flextok_ar", tree)
    assert not list(tmp_path.iterdir())


def change(tree: dict, path: str, value: object) -> dict:
    node = tree["model"]["meta_model"]["models"]
    *parents, last = path.split("/")
    for name in parents:
        node = node[name]
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ar_image_model/head/_args_", [1], "has the entry _args_"),
        ("ar_image_model/trunk/_recursive_", False, "has the entry _recursive_"),
        ("ar_image_model/trunk/num_blocks", 10**9, r"num_blocks .* must be an integer in 1\.\.256"),
        ("ar_image_model/trunk/embed_dim", "48", "embed_dim .* must be an integer"),
        ("ar_image_model/preprocessor/token_grid_size", [16, 16], "grid of 16x16 tokens"),
        ("ar_image_model/preprocessor/pos_embed_type", None, "without positions"),
        ("ar_image_model/head/use_bias", True, "head must be a plain linear layer"),
        ("ar_image_model/trunk/self_attn_target/is_causal", False, "must be causal"),
        ("ar_image_model/trunk/cross_attn_target/num_heads", 4, "same heads"),
        (
            "ar_image_model/trunk/norm_layer",
            {"_target_": "torch.nn.GELU"},
            "norm of a FlexAR is one of RMSNorm",
        ),
        ("ar_image_model/trunk/ffn_target", {"_target_": "torch.nn.GELU"}, "is a SwiGLUFFN, not a GELU"),
        ("text_encoder/t5_embedder/hf_hub_path", "someone/else", "'someone/else' is not one of google"),
        ("text_encoder/mlp/use_bias", True, "has no bias"),
    ],
)
def test_what_was_never_released_is_refused(path: str, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upstream.build_model("flextok_ar", change(text_tree(), path, value))


def test_missing_entries_are_named() -> None:
    tree = class_tree()
    del tree["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]["num_blocks"]
    with pytest.raises(ValueError, match="lacks 'num_blocks'"):
        upstream.build_model("flextok_ar", tree)
    flat = GoldenCase.read(GOLDENS / "ar_c2i_tiny").config
    with pytest.raises(ValueError, match="lacks 'depth'"):
        upstream.build_model("flextok_ar", {key: value for key, value in flat.items() if key != "depth"})
    with pytest.raises(ValueError, match="task must be 'c2i' or 't2i', got 'i2i'"):
        upstream.build_model("flextok_ar", flat | {"task": "i2i"})
    with pytest.raises(ValueError, match="norm must be one of rmsnorm"):
        upstream.build_model("flextok_ar", flat | {"norm": "batchnorm"})


@pytest.mark.parametrize(
    ("dim", "multiple_of", "expected"), [(768, 256, 2048), (1664, 256, 4608), (1664, 1, 4437), (48, 32, 128)]
)
def test_hidden_widths_are_rounded_up(dim: int, multiple_of: int, expected: int) -> None:
    tree = class_tree()
    trunk = tree["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]
    tree["model"]["width"], trunk["attn_target"]["dim"], trunk["attn_target"]["num_heads"] = dim, dim, 2
    trunk["ffn_target"]["multiple_of"] = multiple_of
    with torch.device("meta"):
        model = upstream.build_model("flextok_ar", tree)
    assert model.config["mlp_dim"] == expected


def test_published_settings_become_ours() -> None:
    published = {
        "sample": True,
        "temperature": 0.9,
        "top_k": 0,
        "top_p": 0.0,
        "cfg_factor": 1.5,
        "timesteps": 20,
    }
    assert sampling_settings(published) == {
        "guidance_scale": 1.5,
        "temperature": 0.9,
        "top_k": None,  # 0 is off in the release
        "top_p": 1.0,
        "decode_options": {
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "guidance_mode": "normalized",
        },
    }
    known = inspect.signature(FlexTok.decode).parameters
    assert set(sampling_settings(published)["decode_options"]) <= set(known)
    greedy = sampling_settings({"sample": False, "top_p": 0.8, "tokenizer_perform_norm_guidance": False})
    assert (greedy["top_k"], greedy["top_p"], greedy["guidance_scale"]) == (1, 0.8, 3.0)
    assert greedy["decode_options"]["guidance_mode"] == "plain"
