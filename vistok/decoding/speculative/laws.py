"""What a rule does at one node, exactly: how often it accepts, and how far from the target it ends up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import JudgingRule, Proposals
from vistok.decoding.speculative.lantern import LanternRule, Mode
from vistok.decoding.speculative.neighbours import NeighbourTable

MAX_DRAFTS = 500_000
CHUNK_ELEMENTS = 2**22  # probabilities judged at once


@dataclass(frozen=True)
class Drafts:
    """What may be proposed at one node, and how probable it is.

    Args:
        tokens: `[m k]` int64, k proposals in the order in which they are tried.
        weights: `[m]` with sum 1.
        draft: `[v]`, what they were drawn from; `None` if they are a function of the prefix.
        with_replacement: see `Proposals`.
    """

    tokens: Tensor
    weights: Tensor
    draft: Tensor | None = None
    with_replacement: bool = False

    @classmethod
    def certain(cls, tokens: Tensor) -> Drafts:
        """The proposals `tokens [k]` and no others, a function of the prefix."""
        return cls(tokens[None], torch.ones(1, dtype=torch.float64))

    @classmethod
    def equally_probable(cls, tokens: Tensor, draft: Tensor, *, with_replacement: bool = False) -> Drafts:
        """A sample `tokens [m k]` of what is drawn from `draft [v]`: for vocabularies too large for `all_drafts`."""
        weights = torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64)
        return cls(tokens, weights, draft, with_replacement)


def all_drafts(draft: Tensor, num_drafts: int, *, with_replacement: bool) -> Drafts:
    """Everything that can be drawn from `draft [v]` in `num_drafts` draws.

    Raises:
        ValueError: more draws than tokens that could be drawn, or too many possibilities.
    """
    support = draft.nonzero()[:, 0].tolist()
    if num_drafts < 1 or (num_drafts > len(support) and not with_replacement):
        raise ValueError(f"cannot draw {num_drafts} tokens from {len(support)} without replacement")
    if len(support) ** num_drafts > MAX_DRAFTS:
        raise ValueError(
            f"{num_drafts} draws from {len(support)} tokens are too many to list; take fewer or a sample"
        )
    listed = product(support, repeat=num_drafts) if with_replacement else permutations(support, num_drafts)
    tokens = torch.tensor(list(listed))  # [m k]
    probs = draft.double()[tokens]
    if not with_replacement:
        probs = probs / (draft.double().sum() - (probs.cumsum(dim=1) - probs))
    weights = probs.prod(dim=1)
    return Drafts(tokens, weights / weights.sum(), draft, with_replacement)


@dataclass(frozen=True)
class NodeLaw:
    """What comes out at one node."""

    acceptance: float  # probability that a draft is accepted
    tokens: Tensor  # [v] float64: distribution of the token that comes out

    def total_variation(self, target: Tensor) -> float:
        """Distance from `target [v]`: the largest difference in the probability of any set of tokens."""
        return float((self.tokens - target.double()).abs().sum() / 2)


def node_law(rule: JudgingRule, target: Tensor, drafts: Drafts) -> NodeLaw:
    """What `rule` makes of the proposals, averaged over `drafts`; nothing is drawn.

    Args:
        rule: any rule of this package.
        target: `[v]` float32 probabilities.
        drafts: for the same vocabulary.
    """
    acceptance, law = 0.0, torch.zeros(len(target), dtype=torch.float64)
    for rows in torch.arange(len(drafts.tokens)).split(max(1, CHUNK_ELEMENTS // len(target))):
        tokens, weights = drafts.tokens[rows], drafts.weights[rows]
        draft = None if drafts.draft is None else drafts.draft.expand(len(rows), -1)
        exists = torch.ones_like(tokens, dtype=torch.bool)
        proposals = Proposals(tokens, exists, draft, drafts.with_replacement)
        judgement = rule.judge(target.expand(len(rows), -1), proposals)
        acceptance += float(weights @ judgement.acceptance())
        law += weights @ judgement.law(tokens)
    return NodeLaw(acceptance, law)


@dataclass(frozen=True)
class Deviation:
    """What LANTERN gains and costs at one node."""

    k: int
    delta: float
    acceptance: float
    total_variation: float  # of the token that comes out, from the target


def lantern_deviation(
    table: NeighbourTable,
    target: Tensor,
    drafts: Drafts,
    ks: Iterable[int],
    deltas: Iterable[float],
    mode: Mode = "default",
) -> list[Deviation]:
    """How far LANTERN moves the token at one node, for every pair of k and delta.

    Args:
        table: of the codebook.
        target: `[v]` float32 probabilities.
        drafts: what may be proposed.
        ks, deltas, mode: see `LanternRule`.
    """
    deltas, rows = list(deltas), []
    for k in ks:
        for delta in deltas:
            law = node_law(LanternRule(table, k, delta, mode), target, drafts)
            rows.append(Deviation(k, delta, law.acceptance, law.total_variation(target)))
    return rows
