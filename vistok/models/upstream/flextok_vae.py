"""The published autoencoders of FlexTok: configuration and keys, those of diffusers' `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.quantizers.gaussian import LOGVAR_RANGE
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.models.upstream.keys import rename_keys

RENAMES = {
    f"{part}.": f"autoencoder.{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")
}
# entries that change the numbers and that we support with one value only
FIXED: dict[str, Any] = {
    "act": "silu",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "logvar_clamp": list(LOGVAR_RANGE),
}
OURS = {
    "latent_channels": "latent_channels",
    "block_out_channels": "dims",
    "layers_per_block": "depth",
    "norm_num_groups": "num_groups",
    "mid_block_attention": "mid_attention",
    "mid_block_add_attention": "mid_attention",
    "quant_convs": "quant_convs",
    "use_quant_conv": "quant_convs",
    "scaling_factor": "scaling_factor",
}


def build_model(config: Mapping[str, Any]) -> KLTokenizer:
    """The model that a published configuration describes, not loaded.

    Args:
        config: that of `AutoencoderKL`, or a flat one with the same meaning; what it lacks is as released.

    Raises:
        ValueError: the configuration asks for what was never released.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} in a FlexTok autoencoder, got {config[name]!r}")
    if config.get("use_quant_conv", True) != config.get("use_post_quant_conv", True):
        raise ValueError("use_quant_conv and use_post_quant_conv must agree in a FlexTok autoencoder")
    return KLTokenizer(**{ours: config[name] for name, ours in OURS.items() if name in config})


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `KLTokenizer`."""
    return rename_keys(weights, RENAMES)
