"""SpecTr: several independent drafts of one token, chosen from nearly as well as can be."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import Judgement, JudgingRule, Proposals

NUM_BISECTIONS = 30


class SpecTrRule(JudgingRule):
    """k-sequential selection (Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport",
    algorithm 2), lossless.

    Proposals are tried one after another, each accepted with the same `min(1, target / (rho draft))`. The factor
    rho, from 1 to the number of proposals k, is the smallest that leaves no token with more than its target
    probability. Acceptance is at least `1 - 1/e` times the best possible one.

    Proposals have to be drawn with replacement; one per row is as well. With one, this is `StrictRule`.
    """

    is_lossless = True

    def judge(self, target: Tensor, proposals: Proposals) -> Judgement:
        """See `AcceptRule`.

        Raises:
            ValueError: several proposals that were not drawn with replacement, or any that were not drawn.
        """
        are_tried = proposals.are_tried()
        if not proposals.tokens.shape[1]:  # of any kind
            return Judgement(are_tried, target[:, :0], target)
        draft = _independent_draft(proposals)
        count = are_tried.sum(dim=1, keepdim=True)  # [b 1]
        scale = smallest_scale(target, draft, count.clamp_min(1))
        covered = torch.minimum(draft.double(), target.double() / scale)  # [b v]: accepted from one draw
        likelihood = draft.gather(1, proposals.tokens).double()
        chances = covered.gather(1, proposals.tokens) / torch.where(likelihood > 0, likelihood, 1.0)
        leftover = _leftover(target.double(), covered, count)
        chances = torch.where(are_tried, chances, 0.0).clamp_max(1)
        return Judgement(are_tried, chances.to(target.dtype), leftover.to(target.dtype))


def smallest_scale(target: Tensor, draft: Tensor, count: Tensor) -> Tensor:
    """The factor rho of every row (Sun et al. 2023, section 5).

    Args:
        target, draft: `[b v]` probabilities.
        count: `[b 1]`, how many independent draws there are, at least 1.

    Returns:
        `[b 1]` float64 from 1 to `count`, too large by at most `count / 2**30`.
    """
    target, draft, high = target.double(), draft.double(), count.double()
    low = torch.ones_like(high)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        single = torch.minimum(draft, target / middle).sum(dim=1, keepdim=True).clamp_max(1)
        is_enough = _acceptance(single, count) <= middle * single
        low, high = torch.where(is_enough, low, middle), torch.where(is_enough, middle, high)
    return high


def _independent_draft(proposals: Proposals) -> Tensor:
    if proposals.draft is None:
        raise ValueError("SpecTr needs drawn proposals; for deterministic ones take StrictRule")
    if proposals.tokens.shape[1] > 1 and not proposals.with_replacement:
        raise ValueError("SpecTr needs proposals drawn with replacement; for others take StrictRule")
    return proposals.draft


def _acceptance(single: Tensor, count: Tensor) -> Tensor:
    """Of any of `count` draws, where each is accepted with probability `single`."""
    return 1 - (1 - single) ** count


def _leftover(target: Tensor, covered: Tensor, count: Tensor) -> Tensor:
    """What the target has beyond what accepted draws make up, `[b v]`; the target itself where there are no draws,
    or nothing but rounding is left."""
    single = covered.sum(dim=1, keepdim=True).clamp_max(1)
    num_chances = torch.where(single > 0, _acceptance(single, count) / single, count.double())
    rest = (target - covered * num_chances).clamp_min(0)
    mass = rest.sum(dim=1, keepdim=True)
    has_rest = (mass > 0) & (count > 0)
    return torch.where(has_rest, rest / torch.where(has_rest, mass, 1.0), target)
