"""The published LlamaGen generators: configuration, keys and sampling settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.generators.llamagen import LlamaGen, LlamaGenClass, LlamaGenText
from vistok.models.upstream.keys import rename_keys

RENAMES = {
    "cls_embedding.embedding_table.": "prefix.embed.",
    "cls_embedding.cap_proj.": "prefix.",
    "cls_embedding.uncond_embedding": "prefix.null_text",
    "tok_embeddings.": "token_embed.",
    "layers.{i}.attention.wqkv.": "blocks.{i}.attn.qkv.",
    "layers.{i}.attention.wo.": "blocks.{i}.attn.proj.",
    "layers.{i}.feed_forward.w1.": "blocks.{i}.mlp.gate.",
    "layers.{i}.feed_forward.w2.": "blocks.{i}.mlp.down.",
    "layers.{i}.feed_forward.w3.": "blocks.{i}.mlp.up.",
    "layers.{i}.attention_norm.": "blocks.{i}.norm1.",
    "layers.{i}.ffn_norm.": "blocks.{i}.norm2.",
    "output.": "head.",
}
IGNORED = {"freqs_cis": "rotary factors of one grid, which old files stored; they follow from the sizes"}
NEEDED = ("dim", "n_layer", "n_head")


def build_model(config: Mapping[str, Any]) -> LlamaGen:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: `model_type` ("c2i" or "t2i"), `dim`, `n_layer`, `n_head`, and where they differ from those of the release
            `block_size` (tokens per image), `vocab_size`, `num_classes` or `caption_dim` and `cls_token_num` (positions of
            a text), `n_kv_head`, `multiple_of`, `ffn_dim_multiplier`, `rope_base`, `norm_eps`, and the dropouts
            `token_dropout_p`, `resid_dropout_p`, `ffn_dropout_p`.

    Raises:
        ValueError: the configuration lacks an entry, or asks for what was never released.
    """
    model_type = config.get("model_type", "c2i")
    if model_type == "c2i":
        return LlamaGenClass(**class_arguments(config))
    if model_type == "t2i":
        return LlamaGenText(**text_arguments(config))
    raise ValueError(f"model_type must be 'c2i' or 't2i', got {model_type!r}")


def class_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class-conditional generator; raises as `build_model` does."""
    if config.get("cls_token_num", 1) != 1:
        raise ValueError(f"a class is one token, cls_token_num is {config['cls_token_num']}")
    return {**_sizes(config), "num_classes": config.get("num_classes", 1000)}


def text_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a text-conditional generator; raises as `build_model` does."""
    text = {
        "text_dim": config.get("caption_dim", 2048),
        "max_text_length": config.get("cls_token_num", 120),
    }
    return {**_sizes(config), **text}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    if missing := [name for name in NEEDED if name not in config]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    for name in ("attn_dropout_p", "drop_path_rate"):
        if config.get(name, 0.0) != 0.0:
            raise ValueError(f"{name} is {config[name]}; it is 0 in all releases, and this model has none")
    return {
        "codebook_size": config.get("vocab_size", 16384),
        "num_tokens": config.get("block_size", 256),
        "dim": config["dim"],
        "depth": config["n_layer"],
        "num_heads": config["n_head"],
        "num_kv_heads": config.get("n_kv_head"),
        "mlp_dim": mlp_dim(config),
        "norm_eps": config.get("norm_eps", 1e-5),
        "rope_base": float(config.get("rope_base", 10000)),
        "token_dropout": config.get("token_dropout_p", 0.1),
        "residual_dropout": config.get("resid_dropout_p", 0.1),
        "mlp_dropout": config.get("ffn_dropout_p", 0.1),
    }


def mlp_dim(config: Mapping[str, Any]) -> int:
    """The hidden width of the gated MLP: two thirds of four times the width, rounded up to a multiple (as LLaMA)."""
    hidden = 8 * config["dim"] // 3
    multiplier, multiple = config.get("ffn_dim_multiplier"), config.get("multiple_of", 256)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return math.ceil(hidden / multiple) * multiple


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `LlamaGenClass` or `LlamaGenText`."""
    return rename_keys(weights, RENAMES, ignored=IGNORED)


def sampling_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Published sampling settings -> the arguments of our pipelines.

    `cfg_interval` is the last step after the first token at which guidance acts, counted from 0; -1 stands for all.

    Args:
        published: `cfg_scale` (1 and below are off), `cfg_interval`, `temperature`, `top_k` (0 is off), `top_p`.
    """
    interval = published.get("cfg_interval", -1)
    return common_settings(published) | {"guidance_tokens": interval + 1 if interval > -1 else None}


def common_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """The settings which LlamaGen and NAR count alike."""
    return {
        "guidance_scale": max(float(published.get("cfg_scale", 1.0)), 1.0),
        "temperature": max(float(published.get("temperature", 1.0)), 1e-5),
        "top_k": published.get("top_k", 0) or None,
        "top_p": published.get("top_p", 1.0),
    }
