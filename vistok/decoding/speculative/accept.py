"""Which of the proposals for one position is accepted, and what the token is drawn from where none is.

A rule judges the children of one node of a draft tree, in sibling order, for all rows of a batch. What it does
with a child depends on the children before it and not on the random numbers, so that it can be written down
before any number is drawn: the chance of every child once its turn comes, and the leftover distribution after
the last one (`Judgement`). From that follows the decision, given uniform numbers, and just as well the exact
distribution of the token that comes out (`Judgement.law`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Proposals:
    """Tokens proposed for the next position of every row, in the order in which they are tried.

    Args:
        tokens: `[b k]` int64; k may be 0.
        exists: `[b k]`; False is padding, of rows with fewer proposals.
        draft: `[b v]` probabilities that the tokens were drawn from one after another; `None`: they are a
            deterministic function of the prefix.
        with_replacement: whether every draw was from the whole of `draft`, so that a token can come twice, or
            from what the draws before it left of it.

    Raises:
        ValueError: shapes or types that do not fit, or draws with replacement from nothing.
    """

    tokens: Tensor
    exists: Tensor
    draft: Tensor | None = None
    with_replacement: bool = False

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 [b k], got {self.tokens.dtype} of shape {tuple(self.tokens.shape)}"
            )
        if self.exists.shape != self.tokens.shape or self.exists.dtype != torch.bool:
            raise ValueError(
                f"exists must be bool of the shape of tokens {tuple(self.tokens.shape)}, got "
                f"{self.exists.dtype} of shape {tuple(self.exists.shape)}"
            )
        if self.draft is None and self.with_replacement:
            raise ValueError("proposals drawn with replacement need the distribution they were drawn from")
        if self.draft is not None and (self.draft.ndim != 2 or len(self.draft) != len(self.tokens)):
            raise ValueError(
                f"draft must be [b v] with b = {len(self.tokens)}, got shape {tuple(self.draft.shape)}"
            )

    def are_tried(self) -> Tensor:
        """`[b k]`: existing ones; of equal tokens the first alone, unless they were drawn with replacement."""
        if self.with_replacement:
            return self.exists
        is_same = (self.tokens[:, :, None] == self.tokens[:, None]) & self.exists[:, None]  # [b k k]
        return self.exists & ~is_same.tril(diagonal=-1).any(dim=2)


@dataclass(frozen=True)
class Decision:
    """What became of the proposals for one position."""

    child: Tensor  # [b] int64: the accepted proposal, -1 for none
    leftover: Tensor  # [b v]: what the token is drawn from where none is accepted
    num_tried: Tensor  # [b] int64: how many uniform numbers counted


@dataclass(frozen=True)
class Judgement:
    """What a rule does with proposals, before any random number is drawn."""

    are_tried: Tensor  # [b k]
    chances: Tensor  # [b k] in [0, 1]: of being accepted once all proposals before it were rejected
    leftover: Tensor  # [b v]: what the token is drawn from once all were rejected

    def law(self, tokens: Tensor) -> Tensor:
        """The distribution of the token that comes out, `[b v]` float64, given the proposed `tokens [b k]`."""
        reach = self._reach()
        law = reach[:, -1:] * self.leftover.double()
        return law.scatter_add(1, tokens, reach[:, :-1] * self.chances.double())

    def acceptance(self) -> Tensor:
        """How probable it is that one of the proposals is accepted, `[b]` float64."""
        return 1 - self._reach()[:, -1]

    def _reach(self) -> Tensor:
        """`[b k+1]`: how probable it is that every proposal is reached; the last entry: that all are rejected."""
        rejected = (1 - self.chances.double()).cumprod(dim=1)
        return torch.cat([rejected.new_ones(len(rejected), 1), rejected], dim=1)


class AcceptRule(Protocol):
    """How proposals for one position are accepted or rejected.

    `is_lossless` promises that an accepted token, or one drawn from the leftover where none is accepted, follows
    the target exactly, provided that the proposals come about as they say and that the uniform numbers are fresh.
    """

    is_lossless: bool

    def decide(self, target: Tensor, proposals: Proposals, uniforms: Tensor) -> Decision:
        """Judge the children of one node per row.

        Args:
            target: `[b v]` float32 probabilities of the token.
            proposals: for the same rows.
            uniforms: `[b k]` in [0, 1); number j of a row is for the j-th child that is tried.
        """
        ...


class JudgingRule(ABC):
    """A rule that is defined by its judgement."""

    is_lossless: bool

    @abstractmethod
    def judge(self, target: Tensor, proposals: Proposals) -> Judgement:
        """What becomes of `proposals` where the target is `[b v]`."""

    def decide(self, target: Tensor, proposals: Proposals, uniforms: Tensor) -> Decision:
        """See `AcceptRule`. A row without proposals has -1, and its leftover is the target, as the rule sees it.

        Raises:
            ValueError: shapes that do not fit, or proposals of a kind that the rule does not take.
        """
        _check(target, proposals, uniforms)
        judgement = self.judge(target, proposals)
        tried, num_children = judgement.are_tried, proposals.tokens.shape[1]
        ranks = tried.long().cumsum(dim=1)  # from 1 on
        numbers = uniforms.gather(1, (ranks - 1).clamp_min(0))
        accepted = tried & self.passes(numbers, judgement.chances)
        nobody = accepted.new_ones(len(accepted), 1)
        first = torch.cat([accepted, nobody], dim=1).int().argmax(dim=1)  # [b]; k: nobody
        last = first.clamp_max(max(num_children - 1, 0))[:, None]
        num_tried = ranks.gather(1, last)[:, 0] if num_children else torch.zeros_like(first)
        child = first.masked_fill(first == num_children, -1)
        return Decision(child, judgement.leftover, num_tried)

    def passes(self, uniforms: Tensor, chances: Tensor) -> Tensor:
        """Whether proposals with these `chances` are accepted, all `[b k]`. A chance of 0 never passes."""
        return uniforms < chances


class SequentialRule(JudgingRule):
    """Child by child: what a rejection says about the target is taken out of it before the next child.

    A subclass says how probable a token is taken to be, and what a rejection leaves of the target.
    """

    @abstractmethod
    def probability(self, target: Tensor, tokens: Tensor) -> Tensor:
        """`[b 1]` of the `tokens [b 1]`, where `target [b v]` is what earlier rejections left."""

    @abstractmethod
    def residual(self, target: Tensor, draft: Tensor | None, tokens: Tensor) -> Tensor:
        """What the rejection of `tokens [b 1]` leaves of the target, `[b v]`, not normalised.

        Args:
            target: `[b v]`, what earlier rejections left.
            draft: `[b v]`, what `tokens` were drawn from; `None` where they were not drawn.
            tokens: the rejected ones.
        """

    def judge(self, target: Tensor, proposals: Proposals) -> Judgement:
        """The chance of a child is its probability by the target over that by the draft (1 if it was not drawn).

        A child that the draft cannot have drawn is passed over, but counts as tried.
        """
        draft, rest, chances = proposals.draft, target, []
        are_tried = proposals.are_tried()
        for tokens, is_tried in zip(proposals.tokens.T[..., None], are_tried.T[..., None], strict=True):
            likelihood = torch.ones_like(target[:, :1]) if draft is None else draft.gather(1, tokens)
            is_possible = is_tried & (likelihood > 0)  # [b 1]
            chance = self.probability(rest, tokens) / _positive(likelihood)
            chances.append(torch.where(is_possible, chance.clamp_max(1), 0.0))
            residual = self.normalise(self.residual(rest, draft, tokens), rest)
            rest = torch.where(is_possible, residual, rest)
            if draft is not None and not proposals.with_replacement and len(chances) < are_tried.shape[1]:
                left = draft.scatter(1, tokens, 0.0)
                left = left / _positive(left.sum(dim=1, keepdim=True))
                draft = torch.where(is_tried, left, draft)
        empty = target[:, :0]
        return Judgement(are_tried, torch.cat([empty, *chances], dim=1), rest)

    def normalise(self, residual: Tensor, target: Tensor) -> Tensor:
        """`residual [b v]` with sum 1.

        A residual without mass means that the child cannot be rejected, or is by rounding alone: there, `target`
        stays as it was, so that no token comes out which the target has not.
        """
        mass = residual.sum(dim=1, keepdim=True)
        return torch.where(mass > 0, residual / _positive(mass), target)


def _positive(values: Tensor) -> Tensor:
    """1 in the place of 0, to divide by."""
    return torch.where(values > 0, values, 1.0)


def _check(target: Tensor, proposals: Proposals, uniforms: Tensor) -> None:
    if target.ndim != 2 or len(target) != len(proposals.tokens):
        raise ValueError(
            f"target must be [b v] with b = {len(proposals.tokens)}, got shape {tuple(target.shape)}"
        )
    if proposals.draft is not None and proposals.draft.shape != target.shape:
        raise ValueError(
            f"the draft has shape {tuple(proposals.draft.shape)}, the target {tuple(target.shape)}: "
            "drafter and target need the same vocabulary"
        )
    if uniforms.ndim != 2 or len(uniforms) != len(target) or uniforms.shape[1] < proposals.tokens.shape[1]:
        raise ValueError(
            f"uniforms must hold a number per proposal, {tuple(proposals.tokens.shape)}, "
            f"got shape {tuple(uniforms.shape)}"
        )
