"""The generators that LANTERN published as its targets: LlamaGen under the names of a Hugging Face LLaMA.

The mathematics and the values are those of LlamaGen's own files; queries, keys and values are three matrices here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.generators.llamagen import LlamaGenText
from vistok.models.upstream.keys import join_projections, rename_keys
from vistok.models.upstream.llamagen import common_settings

RENAMES = {
    "model.cls_embedding.cap_proj.": "prefix.",
    "model.cls_embedding.uncond_embedding": "prefix.null_text",
    "model.embed_tokens.": "token_embed.",
    "model.layers.{i}.self_attn.qkv_proj.": "blocks.{i}.attn.qkv.",
    "model.layers.{i}.self_attn.o_proj.": "blocks.{i}.attn.proj.",
    "model.layers.{i}.mlp.gate_proj.": "blocks.{i}.mlp.gate.",
    "model.layers.{i}.mlp.up_proj.": "blocks.{i}.mlp.up.",
    "model.layers.{i}.mlp.down_proj.": "blocks.{i}.mlp.down.",
    "model.layers.{i}.input_layernorm.": "blocks.{i}.norm1.",
    "model.layers.{i}.post_attention_layernorm.": "blocks.{i}.norm2.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
}
SIZES = {  # published name -> ours
    "hidden_size": "dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "vocab_size": "codebook_size",
}


def build_model(config: Mapping[str, Any]) -> LlamaGenText:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: the names of `SIZES`, and where they differ from those of the release `num_key_value_heads`, `block_size`
            (tokens per image), `cls_token_num` (positions of a text), `caption_dim`, `rms_norm_eps` and `rope_base`.

    Raises:
        ValueError: the configuration lacks an entry, or is not of a text-conditional generator.
    """
    if (input_type := config.get("input_type", "t2i")) not in ("t2i", "t2i2"):
        raise ValueError(f"the published targets read texts, input_type 't2i'; got {input_type!r}")
    kv_heads = config.get("num_key_value_heads")
    return LlamaGenText(
        **sizes(config),
        num_tokens=config.get("block_size", 256),
        text_dim=config.get("caption_dim", 2048),
        max_text_length=config.get("cls_token_num", 120),
        num_kv_heads=None if kv_heads == config["num_attention_heads"] else kv_heads,
        norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_base=float(config.get("rope_base", 10000)),
    )


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that generators and drafters share; raises ValueError for a missing entry."""
    if missing := [name for name in SIZES if name not in config]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    return {ours: config[name] for name, ours in SIZES.items()}


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `LlamaGenText`."""
    return rename_keys(join_projections(weights), RENAMES)


def sampling_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Published sampling settings -> the arguments of our pipelines; see `llamagen.common_settings`."""
    return common_settings(published)
