"""The drafters that LANTERN published, for LlamaGen (text to image) and Anole.

That for Anole rotates channel j with channel j + half of a head; ours rotates neighbours. Its queries and keys, and their
norms, are therefore reordered, which no product of a query with a key can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.upstream.keys import join_projections, rename_keys
from vistok.models.upstream.lantern import sizes

RENAMES = {
    "embed_tokens.": "token_embed.",
    "layers.{i}.self_attn.qkv_proj.": "blocks.{i}.attn.qkv.",
    "layers.{i}.self_attn.o_proj.": "blocks.{i}.attn.proj.",
    "layers.{i}.self_attn.q_norm.": "blocks.{i}.attn.q_norm.",
    "layers.{i}.self_attn.k_norm.": "blocks.{i}.attn.k_norm.",
    "layers.{i}.mlp.gate_proj.": "blocks.{i}.mlp.gate.",
    "layers.{i}.mlp.up_proj.": "blocks.{i}.mlp.up.",
    "layers.{i}.mlp.down_proj.": "blocks.{i}.mlp.down.",
    "layers.{i}.input_layernorm.": "blocks.{i}.norm1.",
    "layers.{i}.post_attention_layernorm.": "blocks.{i}.norm2.",
    "fc.": "fuse.",
}
GRIDS = {  # input_type -> tokens per image, condition positions in front of them
    "t2i": (256, 119),
    "t2i2": (1024, 119),
    "c2i": (576, 0),
}
# Its prompts differ in length and are padded on the left, so positions are given for every row.
ANOLE = {"num_tokens": 1024, "prefix_length": 0, "positions": "line", "input_norm": True, "qk_norm": True}


def build_model(config: Mapping[str, Any]) -> EagleDrafter:
    """The drafter that a published configuration describes, not loaded.

    Args:
        config: the names of `lantern.SIZES`, `input_type` (one of `GRIDS`, or "anole"), and where they differ from those
            of the release `rms_norm_eps`, `rope_base` and `bias`, of the first layer.

    Raises:
        ValueError: the configuration lacks an entry, or was never published.
    """
    if config.get("num_key_value_heads", config.get("num_attention_heads")) != config.get(
        "num_attention_heads"
    ):
        raise ValueError("the published drafters have as many heads of keys as of queries")
    common = {
        **sizes(config),
        "rope_base": float(config.get("rope_base", 10000)),
        "input_bias": config.get("bias", True),
    }
    input_type = config.get("input_type", "t2i")
    if input_type == "anole":
        return EagleDrafter(**common, **ANOLE, norm_eps=config.get("rms_norm_eps", 1e-5))
    if input_type not in GRIDS:
        known = ", ".join([*GRIDS, "anole"])
        raise ValueError(f"unknown input_type {input_type!r} of a drafter; known: {known}")
    num_tokens, prefix_length = GRIDS[input_type]
    eps = config.get("rms_norm_eps", 1e-6)
    return EagleDrafter(**common, num_tokens=num_tokens, prefix_length=prefix_length, norm_eps=eps)


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `EagleDrafter`."""
    return rename_keys(join_projections(_neighbours(weights)), RENAMES)


def _neighbours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys of a layer with norms per head `[h d]`, with the channels that turn together side by side."""
    reordered = dict(weights)
    for name in weights:
        layer, found, rest = name.rpartition("_norm.weight")
        if not found or rest or not layer.endswith((".q", ".k")):
            continue
        order = torch.arange(weights[name].shape[1]).view(2, -1).T.flatten()  # 0, d/2, 1, d/2 + 1, ...
        for part in ("weight", "bias"):
            key = f"{layer}_norm.{part}"
            if key in weights:
                reordered[key] = weights[key][:, order.to(weights[key].device)]
        key = f"{layer}_proj.weight"
        if key in weights:
            heads = weights[key].unflatten(0, weights[name].shape)  # [h d dim]
            reordered[key] = heads[:, order.to(heads.device)].flatten(0, 1)
    return reordered
