"""Published checkpoints as our models: `read_checkpoint`, `load_config`, `load`.

Each system has a module of its name with two functions: `build_model(config)` makes the model that a published
configuration describes, `translate_weights(weights)` renames its weights. That of a system of generators has a third,
`sampling_settings(published)`, with the arguments of our pipelines that published settings stand for. `releases` lists
what was published.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vistok.models.upstream.checkpoint import read_checkpoint, read_metadata
from vistok.models.upstream.config import load_config
from vistok.models.upstream.flextok_ar_tree import is_flex_ar_tree, tokenizer_hub_id
from vistok.models.upstream.flextok_tree import is_tree
from vistok.models.upstream.keys import load_strictly

__all__ = [
    "SYSTEMS",
    "build_model",
    "check_system",
    "load",
    "load_config",
    "read_checkpoint",
    "sampling_settings",
    "stored_config",
    "system_of_config",
    "tokenizer_hub_id",
    "translate_weights",
]

SYSTEMS = (
    "flextok",
    "flextok_ar",
    "flextok_vae",
    "kl_vae",
    "lantern",
    "lantern_drafter",
    "llamagen",
    "llamagen_vq",
    "mar",
    "maskgit",
    "maskgit_vqgan",
    "nar",
    "one_d_piece",
    "titok",
    "xar",
)


def load(system: str, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelMixin:
    """A published model as ours, in evaluation mode.

    Args:
        system: one of `SYSTEMS`.
        weights: tensors by published key, see `read_checkpoint`; the model keeps them, without a copy.
        config: the published configuration, see `load_config` and `releases.RELEASES`.

    Raises:
        ValueError: an unknown system, a configuration that was never published, or weights that do not fit it (missing
            and unexpected keys and wrong shapes are listed).
    """
    with torch.device("meta"):
        model = build_model(system, config)
    load_strictly(model, translate_weights(system, weights))
    return model.eval()


def build_model(system: str, config: Mapping[str, Any]) -> ModelMixin:
    """The model that a published configuration describes, with fresh weights; raises as `load` does."""
    return _module(system).build_model(config)


def translate_weights(system: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by published key -> by our key; keys that are not known stay as they are."""
    return _module(system).translate_weights(weights)


def sampling_settings(system: str, published: Mapping[str, Any]) -> dict[str, Any]:
    """Published settings of a generator, in their names and scales -> the arguments of its pipeline.

    Raises:
        ValueError: an unknown system.
    """
    return _module(system).sampling_settings(published)


def stored_config(path: Path | str) -> dict[str, Any] | None:
    """The configuration that a weights file carries in its header, for `load`; `None` if it has none, as most."""
    metadata = read_metadata(path)
    return dict(metadata) if is_tree(metadata) else None


def system_of_config(config: Mapping[str, Any]) -> str | None:
    """The system that a published configuration belongs to, if it tells; `None` if only the weights do."""
    if is_tree(config):
        return "flextok"
    if is_flex_ar_tree(config):
        return "flextok_ar"
    return "flextok_vae" if config.get("_class_name") == "AutoencoderKL" else None


def check_system(system: str) -> None:
    """Raises ValueError, with the nearest name, unless `system` is one of `SYSTEMS`."""
    if system not in SYSTEMS:
        close = difflib.get_close_matches(system, SYSTEMS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(SYSTEMS)}"
        raise ValueError(f"unknown system {system!r}{hint}")


def _module(system: str) -> ModuleType:
    check_system(system)
    return import_module(f"vistok.models.upstream.{system}")
