"""The published MaskGIT generators of TiTok and One-D-Piece: configuration, keys and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.generators.maskgit import MaskGIT, MaskGITBert, MaskGITUViT
from vistok.models.upstream.config import resolve
from vistok.models.upstream.keys import rename_keys

BERT_RENAMES = {
    "model.embeddings.word_embeddings.": "token_embed.",
    "model.embeddings.position_embeddings.": "position_embed.",
    "model.embeddings.token_type_embeddings.": "segment_embed.",
    "model.embeddings.LayerNorm.": "norm.",
    "model.encoder.layer.{i}.attention.self.": "blocks.{i}.attn.",
    "model.encoder.layer.{i}.attention.output.dense.": "blocks.{i}.attn.proj.",
    "model.encoder.layer.{i}.attention.output.LayerNorm.": "blocks.{i}.norm1.",
    "model.encoder.layer.{i}.intermediate.dense.": "blocks.{i}.fc1.",
    "model.encoder.layer.{i}.output.dense.": "blocks.{i}.fc2.",
    "model.encoder.layer.{i}.output.LayerNorm.": "blocks.{i}.norm2.",
    "model.lm_head.": "head.",
}
BERT_IGNORED = {
    "model.embeddings.position_ids": "the numbers 0..n, a buffer that old versions of the BERT library stored",
}
UVIT_RENAMES = {
    "embeddings.": "token_embed.",
    "pos_embed": "position_embed",
    "in_blocks.{i}.mlp.": "in_blocks.{i}.",
    "mid_block.mlp.": "mid_block.",
    "out_blocks.{i}.mlp.": "out_blocks.{i}.",
    "out_blocks.{i}.skip_linear.": "skips.{i}.",
    "lm_head.": "head.",
}
SIZES = {  # published name -> ours
    "codebook_size": "codebook_size",
    "condition_num_classes": "num_classes",
    "image_seq_len": "num_tokens",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
}


def build_model(config: Mapping[str, Any]) -> MaskGIT:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: the nested configuration of the hub (`model.generator`, `model.vq_model`), or a flat one with
            `model_type` ("ViT" when not given), the names of `SIZES`, and for a ViT `dropout` and `attn_drop`.

    Raises:
        ValueError: the configuration lacks an entry, or asks for what was never released.
    """
    config = flatten(config) if "model" in config else config
    if missing := [name for name in SIZES if name not in config]:
        raise ValueError(f"the MaskGIT configuration lacks {', '.join(missing)}")
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    model_type = config.get("model_type", "ViT")
    if model_type == "UViT":
        return MaskGITUViT(**sizes)
    if model_type == "ViT":
        dropout, attention_dropout = config.get("dropout", 0.1), config.get("attn_drop", 0.1)
        return MaskGITBert(**sizes, dropout=dropout, attention_dropout=attention_dropout)
    raise ValueError(f"model_type must be 'ViT' or 'UViT', got {model_type!r}")


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested configuration of the hub as the flat one of `build_model`; `${...}` references are resolved."""
    model = resolve(config)["model"]
    if "generator" not in model:
        raise ValueError("the configuration has no model.generator; is it that of a MaskGIT generator?")
    codebook = {name: size for name, size in model.get("vq_model", {}).items() if name == "codebook_size"}
    return {**codebook, **model["generator"]}


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `MaskGITBert` or `MaskGITUViT`; every key of the former starts with `model.`."""
    if any(key.startswith("model.") for key in weights):
        return rename_keys(weights, BERT_RENAMES, ignored=BERT_IGNORED)
    return rename_keys(weights, UVIT_RENAMES)


def sampling_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Published sampling settings -> the arguments of `ClassToImagePipeline`; defaults are those of the release.

    The release counts a constant or linear scale from 0 and a power-cosine scale from 1; ours is off at 1.
    """
    schedule = config.get("guidance_decay", "constant")
    offset = 0.0 if schedule == "power-cosine" else 1.0
    return {
        "num_inference_steps": config.get("num_sample_steps", config.get("num_steps", 8)),
        "guidance_scale": config.get("guidance_scale", 3.0) + offset,
        "guidance_schedule": schedule,
        "guidance_power": config.get("guidance_scale_pow", 3.0),
        "choice_temperature": config.get("randomize_temperature", 4.5),
        "softmax_annealing": config.get("softmax_temperature_annealing", False),
    }
