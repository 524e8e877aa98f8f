"""The published TiTok tokenizers: configuration and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.tokenizers.titok import SIZES, TiTok, TiTokVAE
from vistok.models.upstream import maskgit_vqgan
from vistok.models.upstream.config import resolve
from vistok.models.upstream.keys import rename_keys

PIXEL_DECODER = {
    "hidden_channels": 128,
    "channel_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "z_channels": 256,
}

_BLOCK_RENAMES = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.": "attn.proj.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "fc1.",
    "mlp.c_proj.": "fc2.",
}
RENAMES = {
    "latent_tokens": "encoder.latent_tokens",
    "encoder.conv_out.": "encoder.to_latents.",
    "decoder.decoder_embed.": "decoder.from_latents.",
    "decoder.conv_out.": "decoder.head.smooth.",
    **{
        f"{part}.{old}": f"{part}.{new}"
        for part in ("encoder", "decoder")
        for old, new in {
            "class_embedding": "class_embed",
            "positional_embedding": "pos_embed",
            "latent_token_positional_embedding": "latent_pos_embed",
            "ln_pre.": "norm_in.",
            "ln_post.": "norm_out.",
            **{f"transformer.{{i}}.{key}": f"blocks.{{i}}.{ours}" for key, ours in _BLOCK_RENAMES.items()},
        }.items()
    },
    "quantize.embedding.": "quantizer.embedding.",
}
TWO_STAGE_RENAMES = {
    "decoder.ffn.": "decoder.head.",
    "pixel_quantize.embedding.": "pixel_decoder.codebook.",
    **{
        f"pixel_{old}": f"pixel_decoder.{new}"
        for old, new in maskgit_vqgan.RENAMES.items()
        if old.startswith("decoder.")
    },
    "pixel_decoder.": "pixel_decoder.decoder.",
}
SINGLE_STAGE_RENAMES = {"decoder.ffn.0.": "decoder.head.to_pixels."}
IGNORED = {"quantize.embed_prob": "running use of the codes, which only the clustering codebook update reads"}


def build_model(config: Mapping[str, Any]) -> TiTok | TiTokVAE:
    """The model that a published configuration describes, not loaded.

    Args:
        config: the nested configuration of the hub (`model.vq_model`, `dataset.preprocessing`), or a flat one with
            `image_size`, `{encoder,decoder}_{width,layers,heads,patch_size}`, `num_latent_tokens`, `token_size`,
            `quantize_mode`, `codebook_size`, `use_l2_norm`, `is_legacy`, `finetune_decoder`, and for a two-stage model
            `pixel_codebook_size`, `pixel_embedding_dim` and `pixel_decoder`.

    Raises:
        ValueError: the configuration lacks an entry, or asks for what was never released.
    """
    config = flatten(config) if "model" in config else config
    try:
        if config.get("quantize_mode", "vq") == "vae":
            return TiTokVAE(**_vae_arguments(config))
        return TiTok(**vq_arguments(config))
    except KeyError as error:
        raise ValueError(f"the TiTok configuration lacks {error}") from None


def vq_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `TiTok` that a flat configuration with discrete tokens stands for; raises as `build_model`."""
    mode, two_stage = config.get("quantize_mode", "vq"), config.get("finetune_decoder", True)
    if mode != "vq":
        raise ValueError(f"quantize_mode must be 'vq' or 'vae', got {mode!r}")
    _check_kind(config, is_legacy=two_stage)
    return {
        "codebook_size": config["codebook_size"],
        "codebook_dim": config["token_size"],
        "commitment_cost": config.get("commitment_cost", 0.25),
        "use_l2_norm": config["use_l2_norm"],
        **_transformer_sizes(config),
        **(_pixel_sizes(config) if two_stage else {}),
    }


def _vae_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_kind(config, is_legacy=False)
    if config.get("finetune_decoder", True):
        raise ValueError("a TiTok VAE has one stage: finetune_decoder and is_legacy are false")
    return {"latent_dim": config["token_size"], **_transformer_sizes(config)}


def _check_kind(config: Mapping[str, Any], *, is_legacy: bool) -> None:
    if config.get("is_legacy", True) != is_legacy:
        raise ValueError(
            "this TiTok configuration is none of the released kinds: two-stage VQ (is_legacy and finetune_decoder "
            "true), single-stage VQ or VAE (both false); an unfinished stage 1 has no pixel decoder to load"
        )


def _transformer_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    sizes = {"image_size": config["image_size"], "num_tokens": config["num_latent_tokens"]}
    for part in ("encoder", "decoder"):
        sizes[f"{part}_patch_size"] = config[f"{part}_patch_size"]
        sizes[f"{part}_dim"] = config[f"{part}_width"]
        sizes[f"{part}_depth"] = config[f"{part}_layers"]
        sizes[f"{part}_num_heads"] = config[f"{part}_heads"]
    return sizes


def _pixel_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    codebook_dim = config.get("pixel_embedding_dim", 256)
    sizes = maskgit_vqgan.decoder_sizes(config.get("pixel_decoder", PIXEL_DECODER), codebook_dim)
    return {
        "pixel_codebook_size": config.get("pixel_codebook_size", 1024),
        "pixel_codebook_dim": codebook_dim,
        **{f"pixel_{name}": size for name, size in sizes.items()},
    }


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested configuration of the hub as the flat one of `build_model`; `${...}` references are resolved."""
    config = resolve(config)
    vq_model = config["model"].get("vq_model")
    if vq_model is None:
        raise ValueError("the configuration has no model.vq_model; is it that of a TiTok tokenizer?")
    flat = dict(vq_model)
    flat["image_size"] = config.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256)
    for part, short in (("encoder", "enc"), ("decoder", "dec")):
        size = vq_model.get(f"vit_{short}_model_size")
        if size not in SIZES:
            raise ValueError(
                f"model.vq_model.vit_{short}_model_size is {size!r}, not one of {', '.join(SIZES)}"
            )
        flat[f"{part}_width"], flat[f"{part}_layers"], flat[f"{part}_heads"] = SIZES[size]
        flat[f"{part}_patch_size"] = vq_model.get(f"vit_{short}_patch_size", 16)
    return flat


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `TiTok` or `TiTokVAE`; the 1x1 convolution that ends the encoder becomes linear."""
    two_stage = any(key.startswith("pixel_") for key in weights)
    stage = TWO_STAGE_RENAMES if two_stage else SINGLE_STAGE_RENAMES
    renamed = rename_keys(weights, {**RENAMES, **stage}, ignored=IGNORED)
    if "encoder.to_latents.weight" in renamed:
        renamed["encoder.to_latents.weight"] = renamed["encoder.to_latents.weight"].flatten(1)
    return renamed
