"""Configurations of the published One-D-Piece tokenizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vistok.models import upstream
from vistok.models.tokenizers.one_d_piece import OneDPiece
from vistok.models.tokenizers.titok import TiTok
from vistok.models.upstream.releases import RELEASES


def changed(**changes: Any) -> dict[str, Any]:
    """The configuration of a release with entries replaced, or removed where `None`."""
    config = copy.deepcopy(dict(RELEASES["one-d-piece-s-256"].config or {}))
    vq_model = config["model"]["vq_model"] | changes
    config["model"]["vq_model"] = {name: value for name, value in vq_model.items() if value is not None}
    return config


def test_the_strict_length_check_makes_a_plain_titok() -> None:
    with torch.device("meta"):
        assert type(upstream.build_model("one_d_piece", changed())) is OneDPiece
        for strict in (True, None):  # the default is strict
            model = upstream.build_model("one_d_piece", changed(strict_length_assertion=strict))
            assert type(model) is TiTok and model.num_tokens == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune_decoder": False, "is_legacy": False}, "has two stages"),
        ({"is_legacy": False}, "none of the released kinds"),
        ({"quantize_mode": "vae"}, "quantize_mode"),
        ({"codebook_size": None}, "One-D-Piece configuration lacks 'codebook_size'"),
    ],
)
def test_unknown_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        upstream.build_model("one_d_piece", changed(**changes))
