"""The published FlexAR generators over FlexTok's tokens: configuration, keys and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.generators.flex_ar import FlexAR, FlexARClass, FlexARText
from vistok.models.upstream.flextok_ar_tree import (
    NORMS,
    is_flex_ar_tree,
    mlp_dim,
    read_tree,
    tokenizer_hub_id,
)
from vistok.models.upstream.keys import rename_keys

__all__ = ["build_model", "sampling_settings", "tokenizer_hub_id", "translate_weights"]

_IMAGE_MODEL = "models.ar_image_model"
_BLOCK = f"{_IMAGE_MODEL}.trunk.blocks.{{i}}"
RENAMES = {
    f"{_IMAGE_MODEL}.preprocessor.embedding.": "token_embed.",
    f"{_IMAGE_MODEL}.preprocessor.cls_embedding.": "class_embed.",
    f"{_IMAGE_MODEL}.preprocessor.positional_embedding": "position_embed",
    f"{_IMAGE_MODEL}.preprocessor.sos_token_embed": "start_embed",
    f"{_BLOCK}.self_attn.": "blocks.{i}.attn.",
    f"{_BLOCK}.cross_attn.Wq.": "blocks.{i}.cross_attn.query.",
    f"{_BLOCK}.cross_attn.Wk.": "blocks.{i}.cross_attn.key.",
    f"{_BLOCK}.cross_attn.Wv.": "blocks.{i}.cross_attn.value.",
    f"{_BLOCK}.norm_1.": "blocks.{i}.norm1.",
    f"{_BLOCK}.norm_2.": "blocks.{i}.norm2.",
    f"{_BLOCK}.norm_3.": "blocks.{i}.norm3.",
    f"{_BLOCK}.mlp.fc1.": "blocks.{i}.mlp.gate.",
    f"{_BLOCK}.mlp.fc2.": "blocks.{i}.mlp.down.",
    f"{_BLOCK}.mlp.fc3.": "blocks.{i}.mlp.up.",
    f"{_BLOCK}.": "blocks.{i}.",
    f"{_IMAGE_MODEL}.trunk.post_trunk_norm.": "out_norm.",
    f"{_IMAGE_MODEL}.head.linear.": "head.",
    "models.text_encoder.mlp.": "text_proj.",
}
IGNORED = {
    "models.image_tokenizer.": "the image tokenizer, which is loaded from its own release",
    "models.text_encoder.t5_embedder.": "the frozen text encoder, which is loaded from its own release",
}
FLAT_NORMS = {name.lower(): norm for name, norm in NORMS.items()}


def build_model(config: Mapping[str, Any]) -> FlexAR:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: the tree of the hub (`model.meta_model`), or a flat one with `task` ("c2i" or "t2i"), `embed_dim`,
            `num_heads`, `depth`, `ffn_multiple_of` (256 when not given), `norm`, `norm_eps`, `qk_norm`, `vocab_size`,
            `num_tokens`, and `num_classes` or `text_dim`.

    Raises:
        ValueError: the configuration lacks an entry, asks for what was never released, or names a foreign class.
    """
    try:
        task, sizes = read_tree(config) if is_flex_ar_tree(config) else _from_flat(config)
    except KeyError as error:
        raise ValueError(f"the FlexAR configuration lacks {error}") from None
    return FlexARText(**sizes) if task == "t2i" else FlexARClass(**sizes)


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `FlexARClass` or `FlexARText`, without the parts that have releases of their own."""
    return rename_keys(weights, RENAMES, ignored=IGNORED)


def _from_flat(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    task = config["task"]
    if task not in ("c2i", "t2i"):
        raise ValueError(f"task must be 'c2i' or 't2i', got {task!r}")
    if config.get("pos_embed", "absolute") is None:
        raise ValueError("a FlexAR without positions was never released")
    if config.get("class_null_index", -1) != -1:
        raise ValueError(f"class_null_index must be -1, got {config['class_null_index']}")
    norm = str(config.get("norm", "rmsnorm")).replace("_", "").lower()
    if norm not in FLAT_NORMS:
        raise ValueError(f"norm must be one of {', '.join(FLAT_NORMS)}, got {norm!r}")
    kind, default_eps = FLAT_NORMS[norm]
    eps = config.get("norm_eps", default_eps)
    dim = config["embed_dim"]
    own = (
        {"num_classes": config["num_classes"]}
        if task == "c2i"
        else {"text_dim": config["text_dim"], "text_gelu": config.get("text_gelu", "tanh")}
    )
    return task, {
        **own,
        "codebook_size": config["vocab_size"],
        "num_tokens": config["num_tokens"],
        "dim": dim,
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "mlp_dim": mlp_dim(int(config.get("mlp_ratio", 4) * dim), config.get("ffn_multiple_of", 256)),
        "norm": kind,
        "norm_eps": eps,
        "qk_norm": kind if config.get("qk_norm", False) else None,
        "qk_norm_eps": config.get("qk_norm_eps", eps),
        "qkv_bias": config.get("qkv_bias", False),
        "bias": config.get("use_bias", False),
        "final_norm": config.get("post_trunk_norm", True),
    }


def sampling_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The published `generation` entries -> the arguments of our pipelines; defaults are those of texts.

    There a `top_k` of 0 and a `top_p` of 0 mean off, and without `sample` the likeliest token is taken.
    """
    top_k, top_p = generation.get("top_k", 0), generation.get("top_p", 0.0)
    if not generation.get("sample", True):
        top_k = 1
    is_normalized = generation.get("tokenizer_perform_norm_guidance", True)
    return {
        "guidance_scale": generation.get("cfg_factor", 3.0),
        "temperature": generation.get("temperature", 1.0),
        "top_k": top_k or None,
        "top_p": top_p or 1.0,
        "decode_options": {
            "num_inference_steps": generation.get("timesteps", 25),
            "guidance_scale": generation.get("tokenizer_cfg_factor", 7.5),
            "guidance_mode": "normalized" if is_normalized else "plain",
        },
    }
