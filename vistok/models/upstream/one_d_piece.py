"""The published One-D-Piece tokenizers: configuration and keys are those of the two-stage TiTok."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.models.tokenizers.one_d_piece import OneDPiece
from vistok.models.tokenizers.titok import TiTok
from vistok.models.upstream.titok import flatten, translate_weights, vq_arguments

__all__ = ["build_model", "translate_weights"]


def build_model(config: Mapping[str, Any]) -> TiTok:
    """The model that a published configuration describes, not loaded.

    Args:
        config: as for `titok.build_model`. With `strict_length_assertion` true, as it is when not given, all tokens are
            decoded and no fewer: that is a plain `TiTok`. All published configurations have it false.

    Raises:
        ValueError: the configuration lacks an entry, or is not that of a two-stage model with discrete tokens.
    """
    config = flatten(config) if "model" in config else config
    if not config.get("finetune_decoder", True):
        raise ValueError("a One-D-Piece has two stages: finetune_decoder and is_legacy are true")
    try:
        arguments = vq_arguments(config)
    except KeyError as error:
        raise ValueError(f"the One-D-Piece configuration lacks {error}") from None
    return TiTok(**arguments) if config.get("strict_length_assertion", True) else OneDPiece(**arguments)
