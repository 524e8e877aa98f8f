"""Lossless rules: what comes out follows the target exactly, however bad the drafts are."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import Judgement, JudgingRule, Proposals, SequentialRule


class StrictRule(SequentialRule):
    """Speculative sampling (Leviathan et al. 2023; Chen et al. 2023) with several candidates per position.

    - Proposals that are a deterministic function of the prefix, as in the trees of EAGLE-2: a token is accepted
      with its target probability; a rejected one is taken out of the target.
    - Drawn without replacement, as in the trees of EAGLE-1: recursive rejection sampling (Jeon et al. 2024, RSD,
      section 3.1). Each token is judged against what its siblings before it left of the draft, and
      `max(0, target - draft)` remains after a rejection.
    - Drawn with replacement: the same with the whole draft each time (Miao et al. 2024, SpecInfer, section 4.3).

    One drawn proposal is accepted with probability `sum(min(target, draft))`, a deterministic one with its own
    target probability, which is tiny where the target is flat: sampled drafts suit image tokens better.
    """

    is_lossless = True

    def probability(self, target: Tensor, tokens: Tensor) -> Tensor:
        """By the target."""
        return target.gather(1, tokens)

    def residual(self, target: Tensor, draft: Tensor | None, tokens: Tensor) -> Tensor:
        """The target without what the draft has covered."""
        if draft is None:
            return target.scatter(1, tokens, 0.0)
        return (target - draft).clamp_min(0)


class GreedyRule(JudgingRule):
    """A child is accepted if it is the most probable token; the first of equally probable ones is.

    Lossless for greedy decoding: the same tokens come out as without drafts. The leftover is the most probable
    token alone, also of a row without proposals.
    """

    is_lossless = True

    def judge(self, target: Tensor, proposals: Proposals) -> Judgement:
        """Chances are 0 or 1."""
        best = target.argmax(dim=1, keepdim=True)  # [b 1]
        are_tried = proposals.are_tried()
        chances = (are_tried & (proposals.tokens == best)).to(target.dtype)
        return Judgement(are_tried, chances, torch.zeros_like(target).scatter(1, best, 1.0))
