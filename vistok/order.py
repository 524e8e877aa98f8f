"""Order: which position is decided at which step. Training masks and decode plans follow from it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """An order over the `num_tokens` positions of one image.

    A fixed order says through `decided_at` when each position is decided; a confidence order finds out while it
    generates. Steps count from 0.
    """

    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"an order needs at least one token, got {self.num_tokens}")

    @property
    def num_steps(self) -> int:
        """Steps until every position is decided."""
        raise NotImplementedError(f"{type(self).__name__} does not define num_steps")

    def decided_at(self) -> Tensor:
        """`[n]` int64: the step at which each position is decided."""
        raise NotImplementedError(f"{type(self).__name__} does not define decided_at()")

    def training_mask(self) -> Tensor:
        """`[n n]` boolean: row q, column k is True where the prediction of q may use the token at k."""
        step = self.decided_at()
        return step[None, :] < step[:, None]

    def plan(self) -> list[Tensor]:
        """The positions decided at each step, in ascending order."""
        step = self.decided_at()
        return [(step == i).nonzero()[:, 0] for i in range(self.num_steps)]


@dataclass(frozen=True)
class RasterOrder(Order):
    """Next token: one position per step, in storage order."""

    @property
    def num_steps(self) -> int:
        return self.num_tokens

    def decided_at(self) -> Tensor:
        return torch.arange(self.num_tokens)


@dataclass(frozen=True)
class ConfidenceOrder(Order):
    """MaskGIT (Chang et al. 2022, section 3.2): all positions are predicted at once, the surest are kept.

    Which positions these are depends on the model; how many stay masked follows the arccos schedule of TiTok's
    generators: a share `arccos((step + 1) / steps) / (pi / 2)` of all positions.
    """

    steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"a confidence order needs at least one step, got {self.steps}")

    @property
    def num_steps(self) -> int:
        return self.steps

    def training_mask(self) -> Tensor:
        return torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool)

    def num_masked_after(self, step: int, num_masked: int) -> int:
        """Positions left masked after `step`, of `num_masked` before it; at least one is decided at each step.

        While more than one step remains at least one position stays masked, so that the last step has work.
        """
        if step + 1 == self.steps:
            return 0
        share = math.acos((step + 1) / self.steps) / (math.pi / 2)
        return max(1, min(num_masked - 1, math.floor(self.num_tokens * share)))
