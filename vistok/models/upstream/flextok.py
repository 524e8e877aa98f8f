"""The published FlexTok tokenizers: configuration and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.models.tokenizers.flextok import FlexTok
from vistok.models.tokenizers.flextok_blocks import ATTENTION_SCALE
from vistok.models.upstream.flextok_config import read_tree
from vistok.models.upstream.flextok_tree import is_tree
from vistok.models.upstream.keys import rename_keys

STAGES = {
    "encoder.module_dict.enc_patch_emb.patch_proj.": "encoder.patches.proj.",
    "encoder.module_dict.enc_posemb_module.posembs": "encoder.patches.positions",
    "encoder.module_dict.enc_register_module.registers": "encoder.registers",
    "encoder.module_dict.enc_to_latents.proj.": "encoder.to_codes.",
    "decoder.module_dict.dec_from_latents.proj.": "decoder.from_codes.",
    "decoder.module_dict.dec_registers_posemb_module.posembs": "decoder.positions",
    "decoder.module_dict.dec_nested_dropout.dropout_mask_token": "decoder.mask_vector",
    "decoder.module_dict.dec_latent_dropout.nullcond": "decoder.learned_null",
    "decoder.module_dict.dec_noise_patch_emb.patch_proj.": "decoder.patches.proj.",
    "decoder.module_dict.dec_patches_posemb_module.posembs": "decoder.patches.positions",
    "decoder.module_dict.dec_time_embedder.mlp.0.": "decoder.time.fc1.",
    "decoder.module_dict.dec_time_embedder.mlp.2.": "decoder.time.fc2.",
    "decoder.module_dict.dec_to_patches.adaLN_modulation.1.": "decoder.head_modulation.",
    "decoder.module_dict.dec_to_patches.proj.": "decoder.to_patches.",
}
RENAMES = {
    "vae.vae.": "vae.autoencoder.",
    **STAGES,
    "decoder.module_dict.dec_transformer.blocks.{i}.adaLN_modulation.1.": "decoder.block_modulations.{i}.",
    "encoder.module_dict.enc_transformer.blocks.": "encoder.blocks.",
    "decoder.module_dict.dec_transformer.blocks.": "decoder.blocks.",
}
QUERY = ".attn.wq."

# our constructor argument -> entry of a flat configuration
FLAT = {
    "num_tokens": "num_registers",
    "levels": "fsq_levels",
    "latent_patch_size": "patch_size",
    "encoder_dim": "enc_dim",
    "encoder_depth": "enc_depth",
    "decoder_dim": "dec_dim",
    "decoder_depth": "dec_depth",
    "head_dim": "head_dim",
    "mlp_ratio": "mlp_ratio",
    "gated_mlp": "gated_mlp",
    "qkv_bias": "qkv_bias",
    "proj_bias": "proj_bias",
    "mlp_bias": "mlp_bias",
    "qk_norm": "qk_norm",
    "norm_eps": "norm_eps",
    "time_dim": "frequency_embedding_size",
    "max_timestep": "max_timestep",
    "latent_channels": "latent_channels",
    "scaling_factor": "scaling_factor",
    "sample_posterior": "sample_posterior",
}
FLAT_VAE = {
    "vae_dims": "block_out_channels",
    "vae_depth": "layers_per_block",
    "vae_num_groups": "norm_num_groups",
}
# entries of a flat configuration that we support with one value only
FIXED: dict[str, Any] = {
    "activation": "silu",
    "norm_affine": False,
    "adaLN_expansion": 2,
    "register_posemb": "learned 1d",
    "patch_posemb": "sincos2d",
}


def build_model(config: Mapping[str, Any]) -> FlexTok:
    """The model that a published configuration describes, not loaded.

    Args:
        config: the tree that checkpoints carry (see `flextok_config`), or a flat configuration with the entries of
            `FLAT` and `grid_size` (patches per side), `vae` (see `FLAT_VAE`), `vae_down_factor`, `null_condition`; what
            it lacks is as in the class defaults of the release.

    Raises:
        ValueError: the configuration names foreign classes, lacks an entry or asks for what was never released.
    """
    if is_tree(config):
        return FlexTok(**read_tree(config))
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} in FlexTok, got {config[name]!r}")
    vae = config.get("vae", {})
    arguments = {ours: config[name] for ours, name in FLAT.items() if name in config}
    arguments |= {ours: vae[name] for ours, name in FLAT_VAE.items() if name in vae}
    model = FlexTok(image_size=_image_size(config), learned_null=_has_learned_null(config), **arguments)
    _check_derived(config, model)
    return model


def _image_size(config: Mapping[str, Any]) -> int:
    levels = len(config.get("vae", {}).get("block_out_channels", (128, 256, 512, 512)))
    return config.get("grid_size", 16) * config.get("patch_size", 2) * 2 ** (levels - 1)


def _has_learned_null(config: Mapping[str, Any]) -> bool:
    kind = config.get("null_condition", "learned")
    if kind not in ("learned", "zero", "zeros"):
        raise ValueError(f"null_condition must be 'learned' or 'zero', got {kind!r}")
    return kind == "learned"


def _check_derived(config: Mapping[str, Any], model: FlexTok) -> None:
    """Entries that follow from others must agree with them."""
    head_dim = model.config["head_dim"]
    derived = {"attention_scale": ATTENTION_SCALE / head_dim, "vae_down_factor": model.vae.patch_size}
    for name, value in derived.items():
        if abs(config.get(name, value) - value) > 1e-9:
            raise ValueError(f"{name} must be {value} with these sizes, got {config[name]}")


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `FlexTok`; queries, keys and values of a block become one projection."""
    renamed = rename_keys(_fused(weights), RENAMES)
    name = "decoder.positions"
    if name in renamed and renamed[name].ndim == 4:
        renamed[name] = renamed[name][0, 0].T.contiguous()  # [1 1 d n] -> [n d]
    return renamed


def _fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace `wq`, `wk` and `wv [d d]` by `qkv [3d d]`, and their biases, where all three are there."""
    fused = dict(weights)
    for query in [key for key in weights if QUERY in key]:
        parts = [query.replace(QUERY, f".attn.{part}.") for part in ("wq", "wk", "wv")]
        if all(part in weights for part in parts):
            fused[query.replace(QUERY, ".attn.qkv.")] = torch.cat([fused.pop(part) for part in parts])
    return fused
