"""The published KL-16 autoencoder of MAR and xAR: configuration, and its keys, those of latent diffusion's first code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.tokenizers.kl import KLTokenizer
from vistok.models.upstream.keys import rename_keys

# entries that change the numbers and that we support with one value only
FIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_ch": 3,
    "norm_eps": 1e-6,
    "double_z": True,
    "use_variational": True,
    "dropout": 0.0,
}
SCALING_FACTOR = 0.2325  # of all generators of these latents
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# convolutions there, linear layers here
POINTWISE = re.compile(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$")


def build_model(config: Mapping[str, Any]) -> KLTokenizer:
    """The model that a published configuration describes, not loaded.

    Args:
        config: the constructor arguments of the release; what it lacks is as in KL-16.

    Raises:
        ValueError: the configuration asks for what was never released.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} in a KL-16 autoencoder, got {config[name]!r}")
    resolution, base = config.get("resolution", 256), config.get("ch", 128)
    dims = [base * multiplier for multiplier in config.get("ch_mult", (1, 1, 2, 2, 4))]

    def levels(name: str, default: tuple[int, ...]) -> list[int]:
        resolutions = config.get(name, default)
        return [level for level in range(len(dims)) if resolution // 2**level in resolutions]

    return KLTokenizer(
        image_size=resolution,
        latent_channels=config.get("embed_dim", 16),
        dims=dims,
        depth=config.get("num_res_blocks", 2),
        num_groups=config.get("norm_groups", 32),
        encoder_attention=levels("attn_resolutions", (16,)),
        decoder_attention=levels("decoder_attn_resolutions", ()),
        scaling_factor=SCALING_FACTOR,
    )


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `KLTokenizer`; 1x1 convolutions of attentions become linear layers."""
    squeezed = {
        key: weight.flatten(1) if POINTWISE.search(key) and weight.shape[2:] == (1, 1) else weight
        for key, weight in weights.items()
    }
    levels = {int(match[1]) for key in weights if (match := re.match(r"decoder\.up\.(\d+)\.", key))}
    return rename_keys(squeezed, _renames(max(levels, default=0) + 1))


def _renames(num_levels: int) -> dict[str, str]:
    """Published prefix -> ours, of a model with `num_levels` resolutions, which its decoder counts from the end."""
    renames: dict[str, str] = {}
    for level in range(num_levels):
        down, up = f"encoder.down.{level}.", f"decoder.up.{level}."
        our_down = f"autoencoder.encoder.down_blocks.{level}."
        our_up = f"autoencoder.decoder.up_blocks.{num_levels - 1 - level}."
        renames |= _level(down, our_down) | _level(up, our_up)
        renames[f"{down}downsample."] = f"{our_down}downsamplers.0."
        renames[f"{up}upsample."] = f"{our_up}upsamplers.0."
    for part in ("encoder", "decoder"):
        theirs, ours = f"{part}.mid.", f"autoencoder.{part}.mid_block."
        renames |= {f"{theirs}block_{i + 1}.": f"{ours}resnets.{i}." for i in range(2)}
        renames |= _attention(f"{theirs}attn_1.", f"{ours}attentions.0.")
        renames[f"{part}.norm_out."] = f"autoencoder.{part}.conv_norm_out."
        renames |= {f"{part}.{conv}.": f"autoencoder.{part}.{conv}." for conv in ("conv_in", "conv_out")}
    return renames | {f"{conv}.": f"autoencoder.{conv}." for conv in ("quant_conv", "post_quant_conv")}


def _level(theirs: str, ours: str) -> dict[str, str]:
    """Residual blocks and attentions of one resolution."""
    return {
        f"{theirs}block.{{j}}.nin_shortcut.": f"{ours}resnets.{{j}}.conv_shortcut.",
        f"{theirs}block.{{j}}.": f"{ours}resnets.{{j}}.",
        **_attention(f"{theirs}attn.{{j}}.", f"{ours}attentions.{{j}}."),
    }


def _attention(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}{their_part}.": f"{ours}{our_part}." for their_part, our_part in ATTENTION.items()}
