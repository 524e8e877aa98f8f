"""Order: which position is decided at which step. Training masks, decode plans and cache slots follow from it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.tokens import Layout


@dataclass(frozen=True)
class Order:
    """An order over the `num_tokens` positions of one image.

    A fixed order says through `decided_at` when each position is decided; a confidence order finds out while it
    generates. Steps count from 0. The tokens of one step are drawn independently of each other, and see each other once
    they are decided.
    """

    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"an order needs at least one token, got {self.num_tokens}")

    @property
    def num_steps(self) -> int:
        """Steps until every position is decided."""
        return int(self.decided_at().max()) + 1

    def decided_at(self) -> Tensor:
        """`[n]` int64: the step at which each position is decided."""
        raise NotImplementedError(f"{type(self).__name__} does not define decided_at()")

    def prediction_mask(self) -> Tensor:
        """`[n n]` boolean: row q, column k is True where the prediction of q may use the token at k."""
        step = self.decided_at()
        return step[None, :] < step[:, None]

    def context_mask(self) -> Tensor:
        """`[n n]` boolean: row q, column k is True where the features of the token at q may use the token at k."""
        step = self.decided_at()
        return step[None, :] <= step[:, None]

    def plan(self) -> list[Tensor]:
        """The positions decided at each step, in ascending order."""
        step = self.decided_at()
        return list(self.sequence().split(step.bincount(minlength=self.num_steps).tolist()))

    def sequence(self) -> Tensor:
        """`[n]` int64: all positions as they are decided, those of one step in ascending order."""
        return self.decided_at().argsort(stable=True)

    def slots(self) -> Tensor:
        """`[n]` int64: where each position lies in a cache that is filled as positions are decided."""
        return self.sequence().argsort()

    def num_steps_within(self, num_tokens: int) -> int:
        """How many steps begin when at most `num_tokens` positions have been decided."""
        counts = self.decided_at().bincount(minlength=self.num_steps)
        return int((counts.cumsum(dim=0) - counts <= num_tokens).sum())


@dataclass(frozen=True)
class RasterOrder(Order):
    """Next token: one position per step, in storage order."""

    def decided_at(self) -> Tensor:
        return torch.arange(self.num_tokens)


@dataclass(frozen=True)
class BlockOrder(Order):
    """Blocks of neighbours in storage order: the rows of a grid, or the frames of a video."""

    block_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1 or self.num_tokens % self.block_size:
            raise ValueError(f"{self.num_tokens} tokens cannot be cut into blocks of {self.block_size}")

    def decided_at(self) -> Tensor:
        return torch.arange(self.num_tokens) // self.block_size


@dataclass(frozen=True)
class PermutationOrder(Order):
    """One position per step, in a random order that `seed` fixes (RAR, Yu et al. 2024, section 3.2)."""

    seed: int = 0

    def decided_at(self) -> Tensor:
        return torch.randperm(self.num_tokens, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class GridOrder(Order):
    """What orders over a grid (h, w) or (t, h, w) share: the coordinates of a position."""

    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.prod(self.grid) != self.num_tokens:
            raise ValueError(f"a grid {list(self.grid)} does not have {self.num_tokens} positions")

    def coordinates(self) -> Tensor:
        """`[n axes]` int64, row-major."""
        return Layout(self.grid).coordinates(self.num_tokens)


@dataclass(frozen=True)
class DiagonalOrder(GridOrder):
    """Next neighbor: planes of equal coordinate sum (He et al. 2025, NAR, section 3.2), in two or three dimensions."""

    def decided_at(self) -> Tensor:
        return self.coordinates().sum(dim=1)


@dataclass(frozen=True)
class CellOrder(GridOrder):
    """Next X with cells: blocks of `cell` neighbours per axis, row by row (Ren et al. 2025, xAR, section 3.2)."""

    cell: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_divides(self.cell, self.grid, "cells")

    def decided_at(self) -> Tensor:
        cells = [size // self.cell for size in self.grid]
        return _ravel(self.coordinates() // self.cell, cells)


@dataclass(frozen=True)
class InterleavedOrder(GridOrder):
    """Next X with subsamples: each step decides every `stride`-th position per axis (xAR, section 3.2)."""

    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_divides(self.stride, self.grid, "strides")

    def decided_at(self) -> Tensor:
        return _ravel(self.coordinates() % self.stride, [self.stride] * len(self.grid))


@dataclass(frozen=True)
class ScaleOrder(Order):
    """Next scale: all positions of one resolution, then those of the next (Tian et al. 2024, VAR, section 3.2)."""

    scales: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if min((size for scale in self.scales for size in scale), default=0) < 1:
            raise ValueError(f"every scale has at least one row and column, got {list(self.scales)}")
        if sum(h * w for h, w in self.scales) != self.num_tokens:
            raise ValueError(f"scales {list(self.scales)} do not have {self.num_tokens} positions together")

    def decided_at(self) -> Tensor:
        sizes = torch.tensor([h * w for h, w in self.scales])
        return torch.arange(len(sizes)).repeat_interleave(sizes)


@dataclass(frozen=True)
class GivenFirst(Order):
    """Another order, in which the positions that are `given` are decided before all others, at step 0.

    For inpainting with models that can follow any order.
    """

    base: Order = RasterOrder(1)
    given: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.num_tokens != self.num_tokens:
            raise ValueError(f"the order has {self.base.num_tokens} positions, not {self.num_tokens}")
        if not set(self.given) <= set(range(self.num_tokens)):
            raise ValueError(f"given positions must lie in 0..{self.num_tokens - 1}, got {list(self.given)}")

    def decided_at(self) -> Tensor:
        step = self.base.decided_at() + 1
        step[list(self.given)] = 0
        return step.unique(return_inverse=True)[1]  # steps without a position fall away


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

    def prediction_mask(self) -> Tensor:
        return torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool)

    def context_mask(self) -> Tensor:
        return self.prediction_mask()

    def num_masked_after(self, step: int, num_masked: int) -> int:
        """Positions left masked after `step`, of `num_masked` before it.

        At least one is decided, unless it is the last one that is masked: while more than one step remains it stays so,
        and the last step has work.
        """
        if step + 1 == self.steps:
            return 0
        share = math.acos((step + 1) / self.steps) / (math.pi / 2)
        return max(1, min(num_masked - 1, math.floor(self.num_tokens * share)))


def make_order(name: str, num_tokens: int, layout: Layout) -> Order:
    """A fixed order by its name.

    Args:
        name: `"raster"`, `"diagonal"`, `"cells-K"` (K x K neighbours), `"interleaved-K"` (every K-th per axis),
            `"scales"`, `"blocks-K"` (K neighbours in storage order) or `"random-SEED"`.
        num_tokens: positions of an image.
        layout: how they are arranged; `"diagonal"`, `"cells"` and `"interleaved"` need a grid, `"scales"` a pyramid.

    Raises:
        ValueError: an unknown name, or an order that does not fit the layout.
    """
    kind, _, argument = name.partition("-")
    is_numbered = kind in ("cells", "interleaved", "blocks", "random") and argument.isdecimal()
    if not is_numbered and name not in ("raster", "diagonal", "scales"):
        raise ValueError(
            f"unknown order {name!r}; known: raster, diagonal, cells-K, interleaved-K, scales, blocks-K, random-SEED"
        )
    if kind in ("diagonal", "cells", "interleaved") and layout.grid is None:
        raise ValueError(f"the order {name!r} needs tokens on a grid, these are a {layout}")
    grid = layout.grid or ()
    match kind:
        case "raster":
            return RasterOrder(num_tokens)
        case "diagonal":
            return DiagonalOrder(num_tokens, grid)
        case "cells":
            return CellOrder(num_tokens, grid, int(argument))
        case "interleaved":
            return InterleavedOrder(num_tokens, grid, int(argument))
        case "blocks":
            return BlockOrder(num_tokens, int(argument))
        case "random":
            return PermutationOrder(num_tokens, int(argument))
        case "scales" if layout.scales is not None:
            return ScaleOrder(num_tokens, layout.scales)
    raise ValueError(f"the order {name!r} needs tokens in several scales, these are a {layout}")


def _check_divides(size: int, grid: tuple[int, ...], what: str) -> None:
    if size < 1 or any(axis % size for axis in grid):
        raise ValueError(f"a grid {list(grid)} cannot be cut into {what} of {size}")


def _ravel(coordinates: Tensor, sizes: list[int]) -> Tensor:
    """`[n axes]` -> row-major numbers `[n]`."""
    weights = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return (coordinates * torch.tensor(weights)).sum(dim=1)
