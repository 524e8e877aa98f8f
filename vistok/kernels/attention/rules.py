"""Masks as functions of indices, the form that FlexAttention compiles and skips blocks by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

OfIndices = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key), all int tensors


@dataclass(frozen=True)
class Rule:
    """A boolean mask, pair by pair.

    Compiled code is kept for a function that closes over tensors, and not for one over a new mask or number each time:
    `allows` reads everything it needs from tensors.

    Args:
        allows: whether a query may attend to a key.
        batch_size: rows with masks of their own; `None` where all share one.
        num_heads: likewise of the heads of queries.
    """

    allows: OfIndices
    batch_size: int | None = None
    num_heads: int | None = None

    def __and__(self, other: Rule) -> Rule:
        left, right = self.allows, other.allows
        return self._joined(other, lambda row, head, q, k: left(row, head, q, k) & right(row, head, q, k))

    def __or__(self, other: Rule) -> Rule:
        left, right = self.allows, other.allows
        return self._joined(other, lambda row, head, q, k: left(row, head, q, k) | right(row, head, q, k))

    def _joined(self, other: Rule, allows: OfIndices) -> Rule:
        return Rule(allows, self.batch_size or other.batch_size, self.num_heads or other.num_heads)


def looked_up(dense: Tensor) -> OfIndices:
    """The entry of a dense mask `[b|1 h|1 q|1 k|1]` at indices."""
    used = [dim for dim in range(4) if dense.shape[dim] > 1]
    entries = dense.squeeze()  # the other axes

    def entry(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        indices = (row, head, query, key)
        return entries[tuple(indices[dim] for dim in used)]

    return entry


def rule_of(dense: Tensor) -> Rule:
    """The rule of a dense boolean mask."""
    batch_size, num_heads = (size if size > 1 else None for size in dense.shape[:2])
    return Rule(looked_up(dense), batch_size, num_heads)
