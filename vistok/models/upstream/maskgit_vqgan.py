"""The published MaskGIT-VQGAN (`maskgit-vqgan-imagenet-f16-256`): configuration and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.models.upstream.keys import rename_keys

RENAMES = {
    "encoder.down.{i}.block.{j}.nin_shortcut.": "encoder.levels.{i}.{j}.shortcut.",
    "encoder.down.{i}.block.": "encoder.levels.{i}.",
    "decoder.up.{i}.block.{j}.nin_shortcut.": "decoder.levels.{i}.blocks.{j}.shortcut.",
    "decoder.up.{i}.block.": "decoder.levels.{i}.blocks.",
    "decoder.up.{i}.upsample_conv.": "decoder.levels.{i}.upsample.",
    "quantize.embedding.": "quantizer.embedding.",
}


def build_model(config: Mapping[str, Any]) -> MaskGITVQGAN:
    """The model that a published configuration describes, not loaded.

    Args:
        config: `num_embeddings`, `embedding_dim`, `commitment_cost` and `autoencoder` (see `decoder_sizes`).

    Raises:
        ValueError: the configuration lacks an entry, or asks for what was never released.
    """
    try:
        sizes = decoder_sizes(config["autoencoder"], config["embedding_dim"])
        return MaskGITVQGAN(
            image_size=config["autoencoder"]["resolution"],
            codebook_size=config["num_embeddings"],
            codebook_dim=config["embedding_dim"],
            commitment_cost=config.get("commitment_cost", 0.25),
            **sizes,
        )
    except KeyError as error:
        raise ValueError(f"the MaskGIT-VQGAN configuration lacks {error}") from None


def decoder_sizes(autoencoder: Mapping[str, Any], codebook_dim: int) -> dict[str, Any]:
    """Our `dim`, `dim_mults` and `depth` of a published `autoencoder` configuration.

    Raises:
        ValueError: the latent channels are not the width of a code, or the images are not RGB.
    """
    if autoencoder.get("z_channels", codebook_dim) != codebook_dim:
        raise ValueError(
            f"z_channels {autoencoder['z_channels']} differs from the code width {codebook_dim}; "
            "MaskGIT-VQGAN has no projection between them"
        )
    if autoencoder.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels must be 3 (RGB), got {autoencoder['num_channels']}")
    return {
        "dim": autoencoder["hidden_channels"],
        "dim_mults": tuple(autoencoder["channel_mult"]),
        "depth": autoencoder["num_res_blocks"],
    }


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `MaskGITVQGAN`."""
    return rename_keys(weights, RENAMES)
