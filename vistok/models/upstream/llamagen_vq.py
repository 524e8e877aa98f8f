"""The published VQ tokenizers of LlamaGen (Sun et al. 2024): configurations and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.tokenizers.vqgan import VQGAN
from vistok.models.upstream.keys import rename_keys

VQ_16 = {"ch_mult": (1, 1, 2, 2, 4)}  # downsampling by 16
VQ_8 = {"ch_mult": (1, 2, 2, 4)}

# Published name -> ours.
SIZES = {
    "image_size": "image_size",
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "use_l2_norm",
    "commit_loss_beta": "commitment_cost",
    "entropy_loss_ratio": "entropy_cost",
    "z_channels": "latent_dim",
    "ch": "dim",
    "num_res_blocks": "depth",
    "ch_mult": "dim_mults",
}
WITHOUT_EFFECT = ("codebook_show_usage", "dropout_p")  # on encoding and decoding

_LEVEL_RENAMES = {
    "res.{j}.nin_shortcut.": "blocks.{j}.shortcut.",
    "res.{j}.": "blocks.{j}.",
    "attn.{j}.norm.": "attentions.{j}.norm.",
    "attn.{j}.q.": "attentions.{j}.query.",
    "attn.{j}.k.": "attentions.{j}.key.",
    "attn.{j}.v.": "attentions.{j}.value.",
    "attn.{j}.proj_out.": "attentions.{j}.out.",
}
_MIDDLE_RENAMES = {"q.": "query.", "k.": "key.", "v.": "value.", "proj_out.": "out."}
RENAMES = {
    "encoder.conv_blocks.{i}.downsample.conv.": "encoder.downsamples.{i}.",
    "decoder.conv_blocks.{i}.upsample.conv.": "decoder.upsamples.{i}.",
    **{
        f"{part}.conv_blocks.{{i}}.{old}": f"{part}.levels.{{i}}.{new}"
        for part in ("encoder", "decoder")
        for old, new in _LEVEL_RENAMES.items()
    },
    **{
        f"{part}.mid.1.{old}": f"{part}.mid.1.{new}"
        for part in ("encoder", "decoder")
        for old, new in _MIDDLE_RENAMES.items()
    },
    "quant_conv.": "encoder.to_codes.",
    "post_quant_conv.": "decoder.from_codes.",
    "quantize.embedding.": "quantizer.embedding.",
}
IGNORED = {
    "quantize.codebook_used": "the most recent indices of the training, from which it logged the usage"
}


def build_model(config: Mapping[str, Any]) -> VQGAN:
    """The model that a published configuration describes, not loaded.

    Args:
        config: the published constructor's arguments, with `ch_mult` for both halves or `encoder_ch_mult` and
            `decoder_ch_mult`, such as `VQ_16`. Ours is `image_size`, 256 by default: the weights are the same for all
            sizes. What is not given is as released: 16384 codes of 8 dimensions, 128 channels, 2 residual blocks.

    Raises:
        ValueError: an entry that the published constructor does not have, no `ch_mult`, or halves that differ.
    """
    given = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    halves = [given.pop(f"{part}_ch_mult") for part in ("encoder", "decoder") if f"{part}_ch_mult" in given]
    multiples = {tuple(mult) for mult in [*halves, given.pop("ch_mult", None)] if mult is not None}
    if len(multiples) != 1:
        raise ValueError(
            "the configuration needs one ch_mult for encoder and decoder, "
            f"got {', '.join(map(str, sorted(multiples))) or 'none'}"
        )
    if unknown := sorted(set(given) - set(SIZES)):
        raise ValueError(
            f"LlamaGen's tokenizer has no setting {', '.join(unknown)}; known: {', '.join(sorted(SIZES))}"
        )
    return VQGAN(dim_mults=multiples.pop(), **{SIZES[name]: value for name, value in given.items()})


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `VQGAN`."""
    return rename_keys(weights, RENAMES, ignored=IGNORED)
