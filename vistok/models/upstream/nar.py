"""The published NAR generators of images: configuration, keys and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.models.generators.nar import NAR, NARClass, NARText
from vistok.models.upstream import llamagen
from vistok.models.upstream.keys import rename_keys

RENAMES = {
    **llamagen.RENAMES,
    "norm.": "right_norm.",
    "output.": "right_head.",
    "medusa_norm.": "below_norm.",
    "medusa_output.": "below_head.",
}


def build_model(config: Mapping[str, Any]) -> NAR:
    """The generator that a published configuration describes, not loaded.

    Args:
        config: as for LlamaGen. `n_layer` does not count the block of the second head, and `medusa_attention_num`, the
            number of such blocks, is 1.

    Raises:
        ValueError: the configuration lacks an entry, or asks for what was never released.
    """
    if config.get("medusa_attention_num", 1) != 1:
        raise ValueError(
            f"medusa_attention_num is {config['medusa_attention_num']}; all releases for images have 1"
        )
    model_type = config.get("model_type", "c2i")
    if model_type == "c2i":
        return NARClass(**llamagen.class_arguments(config))
    if model_type == "t2i":
        return NARText(**llamagen.text_arguments(config))
    raise ValueError(f"model_type must be 'c2i' or 't2i', got {model_type!r}")


def translate_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> keys of `NARClass` or `NARText`."""
    return rename_keys(weights, RENAMES, ignored=llamagen.IGNORED)


def sampling_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Published sampling settings -> the arguments of our pipelines.

    `cfg_interval` is how many tokens an image may have for guidance to act; -1 stands for any number. LlamaGen's counts
    otherwise.

    Args:
        published: see `llamagen.sampling_settings`.
    """
    interval = published.get("cfg_interval", -1)
    return llamagen.common_settings(published) | {"guidance_tokens": interval if interval > -1 else None}
