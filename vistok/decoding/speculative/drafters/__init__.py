"""Drafters besides EAGLE: some need no training, some are models of their own."""

from __future__ import annotations

from collections.abc import Callable

from vistok.decoding.speculative.drafter import Drafter
from vistok.decoding.speculative.drafters.early_exit import EarlyExitDrafter
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.drafters.neighbours import NeighbourDrafter
from vistok.decoding.speculative.drafters.recycling import RecyclingDrafter

__all__ = [
    "TRAINING_FREE",
    "EarlyExitDrafter",
    "IndependentDrafter",
    "JacobiDrafter",
    "NeighbourDrafter",
    "RecyclingDrafter",
]

TRAINING_FREE: dict[str, Callable[[], Drafter]] = {
    "jacobi": JacobiDrafter,
    "neighbours": NeighbourDrafter,
    "recycling": RecyclingDrafter,
}
