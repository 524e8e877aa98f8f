"""Chains of drafted tokens, and how long they get before the target verifies them, decided per row and token by token.

A policy is asked after every drafted token whether another one follows. Its answer may depend on the tokens
drafted so far and what they were drawn from, never on what the target thinks of them, and it never takes a token back:
so every length is as exact as another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vistok.decoding.speculative.tree import DraftTree, TreeBounds
from vistok.decoding.speculative.tree_drafting import Expand, draw_without_replacement, first_level
from vistok.decoding.streams import UniformSource

MEMORY, PRIOR = 0.9, 0.5


@dataclass(frozen=True)
class AcceptanceRate:
    """The running share of tried draft tokens that were accepted, per row; each verification counts `MEMORY` times as
    much as the one after it.

    Args:
        accepted: `[b]` float32, tokens accepted so far, discounted.
        tried: `[b]` float32, tokens that were accepted or rejected so far, discounted. What was drafted behind
            a rejected token was not tried.
    """

    accepted: Tensor
    tried: Tensor

    @classmethod
    def unknown(cls, batch_size: int, device: torch.device) -> AcceptanceRate:
        """Before the first verification."""
        zeros = torch.zeros(batch_size, device=device)
        return cls(zeros, zeros)

    @property
    def rate(self) -> Tensor:
        """`[b]` in [0, 1]; `PRIOR` before the first verification, and then that counts as one token."""
        return (self.accepted + PRIOR) / (self.tried + 1)

    def after(self, num_drafted: Tensor, num_accepted: Tensor) -> AcceptanceRate:
        """With one more verification of a chain.

        Args:
            num_drafted, num_accepted: `[b]` int64.
        """
        tried = torch.minimum(num_drafted, num_accepted + 1)
        return AcceptanceRate(MEMORY * self.accepted + num_accepted, MEMORY * self.tried + tried)


class DraftLength(Protocol):
    """When to stop drafting."""

    @property
    def longest(self) -> int:
        """The most tokens of a draft, at least 1."""
        ...

    def goes_on(self, num_drafted: int, law: Tensor, rate: Tensor) -> Tensor:
        """Whether another token is drafted, `[b]` bool; not asked where a row has stopped or has `longest` tokens.

        Args:
            num_drafted: tokens drafted so far, at least 1.
            law: `[b v]` float32, what the last of them was drawn from.
            rate: `[b]`, the running acceptance rate.
        """
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always `longest` tokens.

    Raises:
        ValueError: `longest` is below 1.
    """

    longest: int = 4

    def __post_init__(self) -> None:
        _check_longest(self.longest)

    def goes_on(self, num_drafted: int, law: Tensor, rate: Tensor) -> Tensor:
        return torch.ones_like(rate, dtype=torch.bool)


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Go on while the drafter is sure of itself: its most probable token has at least `threshold` (Liu et al. 2024,
    Kangaroo, section 3; there 0.6 for text, far above what the flat distributions of images reach).

    Raises:
        ValueError: `longest` is below 1, or `threshold` outside [0, 1].
    """

    longest: int = 8
    threshold: float = 0.2

    def __post_init__(self) -> None:
        _check_longest(self.longest)
        _check_share("threshold", self.threshold)

    def goes_on(self, num_drafted: int, law: Tensor, rate: Tensor) -> Tensor:
        return law.amax(dim=1) >= self.threshold


@dataclass(frozen=True)
class AdaptiveLength:
    """Stop once some drafted token is rejected with a probability above `threshold` (Huang et al. 2024, SpecDec++,
    section 4: of all policies such a threshold is optimal).

    There a trained head foretells every token's acceptance; here it is the row's running acceptance rate.

    Raises:
        ValueError: `longest` is below 1, or `threshold` outside [0, 1].
    """

    longest: int = 8
    threshold: float = 0.7

    def __post_init__(self) -> None:
        _check_longest(self.longest)
        _check_share("threshold", self.threshold)

    def goes_on(self, num_drafted: int, law: Tensor, rate: Tensor) -> Tensor:
        return 1 - rate**num_drafted <= self.threshold


@dataclass(frozen=True)
class ChainDrafting:
    """A `TreeDrafting` whose trees are chains of as many tokens as a policy wants in each row.

    Args:
        length: the policy.
        rate: `[b]`, the running acceptance rate of every row.
        takes_best: draft the most probable tokens, for a greedy target, instead of drawing them.
    """

    length: DraftLength
    rate: Tensor
    takes_best: bool = False

    @property
    def max_nodes(self) -> int:
        return self.length.longest

    def grow(self, roots: Tensor, root_probs: Tensor, expand: Expand, streams: UniformSource) -> DraftTree:
        # As many whatever is drafted.
        uniforms = streams.uniform(self.max_nodes).to(root_probs.device, non_blocking=True)
        tokens, laws = [roots], [root_probs]
        exists = [torch.ones_like(roots, dtype=torch.bool)]
        goes_on, level = exists[0], None
        for num_drafted in range(1, self.length.longest + 1):
            token, is_there = self._choose(laws[-1], uniforms[:, num_drafted - 1, None])  # [b 1] each
            tokens.append(token[:, 0])
            exists.append(goes_on & is_there[:, 0])
            goes_on = exists[-1] & self.length.goes_on(num_drafted, laws[-1], self.rate)
            if num_drafted == self.length.longest or self._is_over(goes_on):
                break
            level = first_level(token) if level is None else level.below(token, torch.zeros_like(token))
            laws.append(expand(level)[:, 0])
        return self._as_tree(torch.stack(tokens, dim=1), torch.stack(exists, dim=1), laws)

    def _choose(self, law: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        if self.takes_best:
            best = law.argmax(dim=1, keepdim=True)
            return best, torch.ones_like(best, dtype=torch.bool)
        return draw_without_replacement(law, uniforms)

    def _is_over(self, goes_on: Tensor) -> bool:
        """Whether no row goes on; only where a policy can stop early does the host wait to hear of it."""
        return not isinstance(self.length, FixedLength) and not bool(goes_on.any())

    def _as_tree(self, tokens: Tensor, exists: Tensor, laws: list[Tensor]) -> DraftTree:
        parents = torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).expand_as(tokens)
        bounds = TreeBounds.chain(tokens.shape[1] - 1)
        if self.takes_best:
            return DraftTree(tokens, parents, exists, bounds=bounds)
        draft_probs = torch.stack([*laws, torch.zeros_like(laws[0])], dim=1)
        return DraftTree(tokens, parents, exists, draft_probs, bounds)


def _check_longest(longest: int) -> None:
    if longest < 1:
        raise ValueError(f"a draft has at least 1 token, got longest {longest}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
