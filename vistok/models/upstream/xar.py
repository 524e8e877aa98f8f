"""The published xAR generators: configuration, keys and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.generators.xar import XAR
from vistok.models.upstream.keys import rename_keys

RENAMES = {
    "class_emb.": "class_embed.",
    "time_embed.mlp.0.": "time_embed.fc1.",
    "time_embed.mlp.2.": "time_embed.fc2.",
    "z_proj.": "latent_embed.",
    "z_proj_ln.": "latent_norm.",
    "decoder_embed.": "between.",
    "pred.": "to_velocity.",
} | {
    theirs: ours
    for stack in ("encoder", "decoder")
    for theirs, ours in {
        f"{stack}_pos_embed_learned": f"{stack}.position_embed",
        f"{stack}_norm.": f"{stack}.norm.",
        f"{stack}_blocks.{{i}}.ada_lin.1.": f"{stack}.blocks.{{i}}.modulation.",
        f"{stack}_blocks.{{i}}.mlp.fc1_g.": f"{stack}.blocks.{{i}}.gate.",
        f"{stack}_blocks.{{i}}.mlp.fc1_x.": f"{stack}.blocks.{{i}}.up.",
        f"{stack}_blocks.{{i}}.mlp.fc2.": f"{stack}.blocks.{{i}}.down.",
        f"{stack}_blocks.{{i}}.attn.": f"{stack}.blocks.{{i}}.attn.",
    }.items()
}
IGNORED = {
    "mask": "who sees whom, which follows from the order",
    "encoder_blocks.{i}.attn.rope.": "tables of the rotations, which follow from the grid",
    "decoder_blocks.{i}.attn.rope.": "as above",
}
NUM_CLASSES = 1000  # whatever `class_num` says
CELL = 8  # tokens per side, the only size that the release finds its way back to the grid from
# entries that we support with one value only
FIXED: dict[str, Any] = {"patch_size": 1, "clusters": 4}
SAME = {  # entries of both stacks, which have one width and one number of heads
    "encoder_embed_dim": "decoder_embed_dim",
    "encoder_num_heads": "decoder_num_heads",
}
OURS = {
    "vae_embed_dim": "latent_dim",
    "encoder_embed_dim": "dim",
    "encoder_depth": "encoder_depth",
    "decoder_depth": "decoder_depth",
    "encoder_num_heads": "num_heads",
    "proj_dropout": "dropout",
    "attn_dropout": "attention_dropout",
}


def build_model(config: Mapping[str, Any]) -> XAR:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: the constructor arguments of the release; what it lacks is as in xAR-B.

    Raises:
        ValueError: the configuration asks for what was never released.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value} in xAR, got {config[name]}")
    for encoder, decoder in SAME.items():
        if config.get(encoder) != config.get(decoder, config.get(encoder)):
            raise ValueError(
                f"both stacks of xAR are equally wide: {encoder} is {config.get(encoder)}, {decoder} {config[decoder]}"
            )
    grid = config.get("img_size", 256) // config.get("vae_stride", 16)
    if grid != 2 * CELL:
        raise ValueError(
            f"xAR has 2 x 2 cells of {CELL} x {CELL} tokens, img_size and vae_stride make {grid} x {grid}"
        )
    sizes = {ours: config[theirs] for theirs, ours in OURS.items() if theirs in config}
    mlp_dim = int(sizes.get("dim", 768) * config.get("mlp_ratio", 4.0) * 2 / 3)
    return XAR(
        num_tokens=grid * grid,
        layout=f"{grid}x{grid}",
        order=f"cells-{CELL}",
        num_classes=NUM_CLASSES,
        mlp_dim=mlp_dim,
        **sizes,
    )


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `XAR`."""
    return rename_keys(weights, RENAMES, ignored=IGNORED)


def sampling_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' settings -> those of `generate_flow`; the guidance scale grows from 1 at the first cell to theirs."""
    return {
        "num_inference_steps": published.get("flow_steps", 50),
        "guidance_scale": published.get("cfg", 1.0),
        "guidance_schedule": "ramp",
    }
