"""The published MAR generators: configuration, keys and sampling settings.

Official training checkpoints keep the evaluated weights under `model_ema`; `model` are the raw ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.models.generators.mar import MAR
from vistok.models.upstream.keys import rename_keys

RENAMES = {
    "class_emb.": "class_embed.",
    "z_proj.": "latent_embed.",
    "z_proj_ln.": "latent_norm.",
    "decoder_embed.": "between.",
    "diffusion_pos_embed_learned": "condition_position",
    "diffloss.net.time_embed.mlp.0.": "denoiser.time_embed.fc1.",
    "diffloss.net.time_embed.mlp.2.": "denoiser.time_embed.fc2.",
    "diffloss.net.cond_embed.": "denoiser.condition_embed.",
    "diffloss.net.input_proj.": "denoiser.input.",
    "diffloss.net.res_blocks.{i}.in_ln.": "denoiser.blocks.{i}.norm.",
    "diffloss.net.res_blocks.{i}.mlp.0.": "denoiser.blocks.{i}.fc1.",
    "diffloss.net.res_blocks.{i}.mlp.2.": "denoiser.blocks.{i}.fc2.",
    "diffloss.net.res_blocks.{i}.adaLN_modulation.1.": "denoiser.block_modulations.{i}.",
    "diffloss.net.final_layer.linear.": "denoiser.output.",
    "diffloss.net.final_layer.adaLN_modulation.1.": "denoiser.output_modulation.",
} | {
    theirs: ours
    for stack in ("encoder", "decoder")
    for theirs, ours in {
        f"{stack}_pos_embed_learned": f"{stack}.position_embed",
        f"{stack}_norm.": f"{stack}.norm.",
        f"{stack}_blocks.{{i}}.mlp.": f"{stack}.blocks.{{i}}.",
        f"{stack}_blocks.{{i}}.": f"{stack}.blocks.{{i}}.",
    }.items()
}
CLASSES, NO_CLASS = "class_emb.weight", "fake_latent"  # one table of ours
SAME = {  # entries of both stacks, which have one width and one number of heads
    "encoder_embed_dim": "decoder_embed_dim",
    "encoder_num_heads": "decoder_num_heads",
}
OURS = {
    "vae_embed_dim": "latent_dim",
    "class_num": "num_classes",
    "buffer_size": "num_buffer_tokens",
    "encoder_embed_dim": "dim",
    "encoder_depth": "encoder_depth",
    "decoder_depth": "decoder_depth",
    "encoder_num_heads": "num_heads",
    "diffloss_w": "denoiser_dim",
    "diffloss_d": "denoiser_depth",
    "proj_dropout": "dropout",
    "attn_dropout": "attention_dropout",
}


def build_model(config: Mapping[str, Any]) -> MAR:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: the constructor arguments of the release; what it lacks is as in MAR-B, whose head is another
            than the default of the release.

    Raises:
        ValueError: the configuration asks for what was never released.
    """
    if config.get("patch_size", 1) != 1:
        raise ValueError(f"patch_size must be 1 in MAR, got {config['patch_size']}")
    for encoder, decoder in SAME.items():
        if config.get(encoder) != config.get(decoder, config.get(encoder)):
            raise ValueError(
                f"both stacks of MAR are equally wide: {encoder} is {config.get(encoder)}, "
                f"{decoder} {config[decoder]}"
            )
    grid = config.get("img_size", 256) // config.get("vae_stride", 16)
    sizes = {ours: config[theirs] for theirs, ours in OURS.items() if theirs in config}
    mlp_dim = int(sizes.get("dim", 768) * config.get("mlp_ratio", 4.0))
    return MAR(num_tokens=grid * grid, layout=f"{grid}x{grid}", mlp_dim=mlp_dim, **sizes)


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `MAR`; "no class", which is stored by itself, becomes the last class."""
    if CLASSES in weights and NO_CLASS in weights:
        classes = torch.cat([weights[CLASSES], weights[NO_CLASS]])
        weights = {key: tensor for key, tensor in weights.items() if key != NO_CLASS} | {CLASSES: classes}
    return rename_keys(weights, RENAMES)


def sampling_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' settings -> those of `generate_mar`; a linear scale grows with the decided tokens."""
    return {
        "num_steps": published.get("num_iter", 64),
        "num_inference_steps": int(published.get("num_sampling_steps", 100)),
        "guidance_scale": published.get("cfg", 1.0),
        "guidance_schedule": published.get("cfg_schedule", "linear"),
        "temperature": published.get("temperature", 1.0),
    }
