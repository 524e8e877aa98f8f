"""LANTERN: rules that let a token stand for its neighbours in the codebook, and so are not lossless.

Jang et al. 2024, "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding", and
Park et al. 2025, "LANTERN++". Images are little changed when a code is exchanged for one near it. So the target
probability of a drafted token is taken to be its own plus that of the nearest codes, as far as a bound allows:

- delta <= 1: the neighbours' mass is at most delta. That is the total variation between the target and the
  target with this mass moved onto the token.
- delta > 1: own and neighbours' mass together are at most delta times the own (LANTERN++'s multiplicative
  bound, which relaxes less where the token itself is improbable).

The bound is one on a single merge. The tokens that come out can be much further from the target, as several
tokens are merged over the draws of the draft: `vistok.decoding.speculative.laws` measures how far.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import Judgement, JudgingRule, Proposals, SequentialRule
from vistok.decoding.speculative.neighbours import NeighbourTable

Mode = Literal["default", "official"]
Ties = Literal["node", "leaf"]


class Merge(NamedTuple):
    """What is added to a token."""

    neighbours: Tensor  # [b k] int64, nearest first
    are_merged: Tensor  # [b k]: the nearest so many
    mass: Tensor  # [b 1]


class Merger:
    """Which neighbours a token stands for.

    Args:
        table: of the codebook that the tokens are from.
        k: how many neighbours at most, apart from the token itself; 0 merges none.
        delta: bound on what they add, see above.

    Raises:
        ValueError: k is negative, not below the size of the codebook or larger than the table is wide; delta is
            negative or not finite.
    """

    def __init__(self, table: NeighbourTable, k: int, delta: float) -> None:
        if not 0 <= k < table.codebook_size:
            raise ValueError(
                f"k must be from 0 to {table.codebook_size - 1}, the other codes of the codebook, got {k}"
            )
        if k > table.num_neighbours:
            raise ValueError(
                f"k = {k} needs a table of as many neighbours, this one has {table.num_neighbours}"
            )
        if not 0 <= delta < math.inf:
            raise ValueError(
                f"delta must be at least 0 and finite, got {delta}; up to 1 it bounds the total variation, "
                "above 1 it is the multiplicative bound of LANTERN++"
            )
        self.table, self.k, self.delta = table, k, delta

    def merge(self, target: Tensor, tokens: Tensor) -> Merge:
        """The longest run of nearest codes whose mass is within the bound.

        Args:
            target: `[b v]`.
            tokens: `[b 1]`.

        Raises:
            ValueError: the table is that of a codebook of another size.
        """
        if target.shape[1] != self.table.codebook_size:
            raise ValueError(
                f"the neighbour table is for {self.table.codebook_size} codes, the target has "
                f"{target.shape[1]} tokens: build it from the codebook of the target's tokenizer"
            )
        neighbours = self.table.nearest(tokens[:, 0], self.k)
        masses = target.gather(1, neighbours)
        bound = self.delta if self.delta <= 1 else (self.delta - 1) * target.gather(1, tokens)
        are_merged = masses.cumsum(dim=1) <= bound
        return Merge(neighbours, are_merged, (masses * are_merged).sum(dim=1, keepdim=True))


class LanternRule(SequentialRule):
    """A drawn or deterministic proposal is judged by the target probability of itself and its neighbours.

    After a rejection, the token and the neighbours that were merged into it are out of the target; what the
    draft covers is subtracted where proposals were drawn. With k = 0, and with delta = 0, this is `StrictRule`
    to the bit.

    `mode="official"` does what was released, for comparison (LlamaGen and Anole; Park et al. 2025). The default
    mends what contradicts the papers or lets wrong tokens out:

    - released: a rejected deterministic proposal takes its k + 1 nearest codes out of the target, however few
      were merged, if at least one was. Mended: those that were merged.
    - released: a rejected drawn proposal takes its k + 1 nearest codes out of the draft, so that the target keeps
      all of their mass. Mended: the merged ones are out of the target, the draft stays.
    - released: a uniform number of exactly 0 accepts a token of probability 0, which filters have removed.
      Mended: nothing does.
    - released: where nothing is left of the target, the leftover is uniform over all tokens, removed ones
      included. Mended: it is the target before the last rejection.

    Kept, as the papers leave it open: the token does not count among its k neighbours (k = 1 is not exact), the
    merged codes are a run of the nearest with the bound inclusive, the bound is on the target as earlier
    rejections left it, and delta = 1 is a bound on mass, not a factor.

    Args:
        table, k, delta: see `Merger`. `mode="official"` needs a table that is one wider than k, or complete.
        mode: whether to do as released.

    Raises:
        ValueError: see `Merger`; or another mode.
    """

    is_lossless = False

    def __init__(self, table: NeighbourTable, k: int, delta: float, mode: Mode = "default") -> None:
        self.merger = Merger(table, k, delta)
        if mode not in ("default", "official"):
            raise ValueError(f"mode must be 'default' or 'official', got {mode!r}")
        self.is_official = mode == "official"
        if self.is_official and min(k + 1, table.codebook_size - 1) > table.num_neighbours:
            raise ValueError(
                f"the released rule with k = {k} needs a table of {k + 1} neighbours, this one has "
                f"{table.num_neighbours}"
            )

    def greedy(self) -> LanternGreedyRule:
        """The rule of the same neighbours for greedy decoding, where a filtered target has no neighbours left."""
        return LanternGreedyRule(self.merger.table, self.merger.k, self.merger.delta)

    def probability(self, target: Tensor, tokens: Tensor) -> Tensor:
        """By the target, neighbours included."""
        return target.gather(1, tokens) + self.merger.merge(target, tokens).mass

    def residual(self, target: Tensor, draft: Tensor | None, tokens: Tensor) -> Tensor:
        """The target without the merged tokens and without what the draft has covered."""
        merge = self.merger.merge(target, tokens)
        if self.is_official:
            return self._released_residual(target, draft, tokens, merge)
        rest = _without(target, merge.neighbours, merge.are_merged)
        return rest.scatter(1, tokens, 0.0) if draft is None else (rest - draft).clamp_min(0)

    def _released_residual(
        self, target: Tensor, draft: Tensor | None, tokens: Tensor, merge: Merge
    ) -> Tensor:
        table = self.merger.table
        count = min(self.merger.k + 1, table.num_neighbours)
        neighbours = table.nearest(tokens[:, 0], count)
        are_removed = merge.are_merged.any(dim=1, keepdim=True).expand_as(neighbours)
        if draft is None:
            return _without(target.scatter(1, tokens, 0.0), neighbours, are_removed)
        return (target - _without(draft, neighbours, are_removed)).clamp_min(0)

    def normalise(self, residual: Tensor, target: Tensor) -> Tensor:
        """See `SequentialRule`; as released, a residual without mass becomes uniform."""
        fallback = torch.full_like(target, 1 / target.shape[1]) if self.is_official else target
        return super().normalise(residual, fallback)

    def passes(self, uniforms: Tensor, chances: Tensor) -> Tensor:
        """See `JudgingRule`; as released, equality passes."""
        return uniforms <= chances if self.is_official else super().passes(uniforms, chances)


def _without(probs: Tensor, tokens: Tensor, are_removed: Tensor) -> Tensor:
    """`probs [b v]` with 0 for those of the distinct `tokens [b k]` that are removed."""
    return probs.scatter(1, tokens, probs.gather(1, tokens).masked_fill(are_removed, 0.0))


class LanternGreedyRule(JudgingRule):
    """A child is accepted if it is the most probable token once its neighbours' mass is added to its own.

    The target has to be the softmax of the logits, neither sharpened nor filtered. No child changes the target
    for the next. The leftover is the most probable token alone, as in `GreedyRule`. `decide` takes the first
    child that qualifies; the release takes the one on the longest path of such children, for which `qualify` says
    which they are.

    Args:
        table, k, delta: see `Merger`.
        ties: of several longest paths, the one whose last node comes first ("node"), or whose first leaf below that
            does ("leaf"). The release goes by nodes in trees of a fixed shape, and by leaves in dynamic ones.

    Raises:
        ValueError: see `Merger`; or an unknown way with ties.
    """

    is_lossless = False

    def __init__(self, table: NeighbourTable, k: int, delta: float, ties: Ties = "node") -> None:
        self.merger = Merger(table, k, delta)
        if ties not in ("node", "leaf"):
            raise ValueError(f"ties must be 'node' or 'leaf', got {ties!r}")
        self.ties = ties

    def judge(self, target: Tensor, proposals: Proposals) -> Judgement:
        """Chances are 0 or 1."""
        are_tried = proposals.are_tried()
        chances = (are_tried & self.qualify(target, proposals.tokens)).to(target.dtype)
        best = target.argmax(dim=1, keepdim=True)
        return Judgement(are_tried, chances, torch.zeros_like(target).scatter(1, best, 1.0))

    def qualify(self, target: Tensor, tokens: Tensor) -> Tensor:
        """Whether each of `tokens [b k]` would be accepted, `[b k]`; of equally probable tokens the first wins."""
        verdicts = torch.zeros_like(tokens, dtype=torch.bool)
        for i in range(tokens.shape[1]):
            token = tokens[:, i : i + 1]
            probability = target.gather(1, token) + self.merger.merge(target, token).mass
            verdicts[:, i] = target.scatter(1, token, probability).argmax(dim=1) == token[:, 0]
        return verdicts
