"""Our constructor arguments from the configuration tree that FlexTok checkpoints carry (see `flextok_tree`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vistok.models.upstream.flextok_tree import Node, checked_parts, checked_stages, class_name

MAX_DIM = 16_384
MAX_DEPTH = 256
MAX_TOKENS = 65_536
MAX_CODEBOOK = 2**24
# settings that change the numbers and that were released with one value only
FIXED: dict[str, dict[str, Any]] = {
    "enc_patch_emb": {"flatten_patches": False},
    "enc_posemb_module": {"posemb_type": "sincos", "posemb_scaling": "absolute"},
    "enc_register_module": {"ordering_mode": "nested"},
    "enc_seq_packer": {"mask_mode": "causal_last"},
    "enc_to_latents": {"use_mup_readout": False},
    "dec_registers_posemb_module": {"posemb_type": "learnable_sum", "posemb_scaling": "absolute"},
    "dec_noise_patch_emb": {"flatten_patches": False},
    "dec_patches_posemb_module": {"posemb_type": "sincos", "posemb_scaling": "absolute"},
    "dec_seq_packer": {"mask_mode": "full", "per_subseq_embs": True},
    "enc_transformer": {"act_layer": None, "norm_layer": None},
    "dec_transformer": {"act_layer": None, "norm_layer": None, "adaLN_expansion": 2},
    "dec_to_patches": {"use_mup_readout": False, "adaLN_bias": True},
}
# options of both transformers and the defaults of their class
TRANSFORMER: dict[str, Any] = {
    "head_dim": 64,
    "mlp_ratio": 4.0,
    "gated_mlp": True,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
    "qk_norm": True,
}
# the trees say nothing of the autoencoder's sizes: all released ones have these
RELEASED_VAE: dict[str, Any] = {"vae_dims": (128, 256, 512, 512), "vae_depth": 2, "vae_num_groups": 32}


def read_tree(config: Node) -> dict[str, Any]:
    """The constructor arguments of `FlexTok` that a stored tree describes.

    Args:
        config: the content of `config.json`, or the metadata of a weights file.

    Raises:
        ValueError: as `checked_parts`; or a value that is missing, of another kind, out of bounds, or never released.
    """
    parts = checked_parts(config)
    encoder, decoder = (checked_stages(side, parts[side]) for side in ("encoder", "decoder"))
    for name, stage in {**encoder, **decoder}.items():
        _check_fixed(name, stage)
    vae, time = parts["vae"], decoder["dec_time_embedder"]
    patch_size = _agreed(
        "patch_sizes", *(_square(stage, "patch_sizes") for stage in _patch_stages(encoder, decoder))
    )
    grid_size = _agreed(
        "max_sizes", *(_square(stage, "max_sizes") for stage in _grid_stages(encoder, decoder))
    )
    return {
        "image_size": grid_size * patch_size * 2 ** (len(RELEASED_VAE["vae_dims"]) - 1),
        "num_tokens": _num_tokens(encoder["enc_register_module"], decoder["dec_registers_posemb_module"]),
        "levels": _levels(parts["regularizer"]),
        "latent_patch_size": patch_size,
        "encoder_dim": _integer(encoder["enc_transformer"], "dim", MAX_DIM),
        "encoder_depth": _integer(encoder["enc_transformer"], "depth", MAX_DEPTH),
        "decoder_dim": _integer(decoder["dec_transformer"], "dim", MAX_DIM),
        "decoder_depth": _integer(decoder["dec_transformer"], "depth", MAX_DEPTH),
        **_transformer_options(encoder["enc_transformer"], decoder["dec_transformer"]),
        "time_dim": _integer({"frequency_embedding_size": 256, **time}, "frequency_embedding_size", MAX_DIM),
        "max_timestep": _number({"max_timestep": 1000.0, **time}, "max_timestep"),
        "learned_null": class_name(decoder["dec_latent_dropout"]["_target_"]) == "LearnedNullCond",
        "latent_channels": _latent_channels(vae, _patch_stages(encoder, decoder)),
        **RELEASED_VAE,
        "scaling_factor": _number(vae, "scaling_factor"),
        "sample_posterior": _boolean({"sample_posterior": True, **vae}, "sample_posterior"),
    }


def _check_fixed(name: str, stage: Node) -> None:
    for key, value in FIXED.get(name, {}).items():
        if stage.get(key, value) != value:
            raise ValueError(f"{name}.{key} must be {value!r}, got {stage[key]!r}: never released in FlexTok")


def _patch_stages(encoder: Mapping[str, Node], decoder: Mapping[str, Node]) -> tuple[Node, Node]:
    return encoder["enc_patch_emb"], decoder["dec_noise_patch_emb"]


def _grid_stages(encoder: Mapping[str, Node], decoder: Mapping[str, Node]) -> tuple[Node, Node]:
    return encoder["enc_posemb_module"], decoder["dec_patches_posemb_module"]


def _num_tokens(registers: Node, positions: Node) -> int:
    sizes = positions.get("max_sizes")
    if not isinstance(sizes, list | tuple) or len(sizes) != 1:
        raise ValueError(f"max_sizes of the registers must hold one number, got {sizes!r}")
    bounds = (_integer(registers, name, MAX_TOKENS) for name in ("n_min", "n_max"))
    return _agreed(
        "the number of registers", *bounds, _integer({"max_sizes": sizes[0]}, "max_sizes", MAX_TOKENS)
    )


def _levels(regularizer: Node) -> tuple[int, ...]:
    levels = regularizer.get("levels")
    if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= 64:
        raise ValueError(f"levels of the regularizer must be a list of integers, got {levels!r}")
    checked = tuple(_integer({"levels": level}, "levels", MAX_CODEBOOK) for level in levels)
    if math.prod(checked) > MAX_CODEBOOK:
        raise ValueError(
            f"the codebook of levels {list(checked)} has more than {MAX_CODEBOOK} entries: refused"
        )
    return checked


def _latent_channels(vae: Node, patch_stages: tuple[Node, Node]) -> int:
    channels = [_integer(stage, "channels_in", MAX_DIM) for stage in patch_stages]
    if "latent_channels" in vae:
        channels.append(_integer(vae, "latent_channels", MAX_DIM))
    return _agreed("the number of latent channels", *channels)


def _transformer_options(encoder: Node, decoder: Node) -> dict[str, Any]:
    """Options that both transformers have in common; released ones never differ in them."""
    options = {}
    for name, default in TRANSFORMER.items():
        values = [{name: default, **node} for node in (encoder, decoder)]
        if isinstance(default, bool):
            options[name] = _agreed(name, *(_boolean(value, name) for value in values))
        elif isinstance(default, int):
            options[name] = _agreed(name, *(_integer(value, name, MAX_DIM) for value in values))
        else:
            options[name] = _agreed(name, *(_number(value, name) for value in values))
    return options


def _square(stage: Node, name: str) -> int:
    """The one number of a pair `[n, n]`."""
    sizes = stage.get(name)
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise ValueError(f"{name} must be a pair of integers, got {sizes!r}")
    return _agreed(name, *(_integer({name: size}, name, 1024) for size in sizes))


def _agreed(what: str, *values: Any) -> Any:
    if any(value != values[0] for value in values):
        raise ValueError(f"the FlexTok configuration gives different values for {what}: {list(values)}")
    return values[0]


def _integer(node: Node, name: str, high: int) -> int:
    value = node.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(
            f"{name} of the FlexTok configuration must be an integer in 1..{high}, got {str(value)[:80]}"
        )
    return value


def _number(node: Node, name: str) -> float:
    value = node.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(
            f"{name} of the FlexTok configuration must be a positive number, got {str(value)[:80]}"
        )
    return float(value)


def _boolean(node: Node, name: str) -> bool:
    value = node.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} of the FlexTok configuration must be true or false, got {str(value)[:80]}")
    return value
