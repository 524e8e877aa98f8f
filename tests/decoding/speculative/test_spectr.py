"""SpecTr: better than trying drafts one by one, and close to the best; exactness is tested with the strict rules."""

from __future__ import annotations

import pytest
import torch

from tests.decoding.speculative.nodes import markov_chain
from vistok.decoding.speculative.accept import Proposals
from vistok.decoding.speculative.laws import all_drafts, node_law
from vistok.decoding.speculative.spectr import SpecTrRule, smallest_scale
from vistok.decoding.speculative.strict import StrictRule
from vistok.decoding.speculative.transport import best_acceptance


@pytest.mark.parametrize("num_drafts", [2, 3, 4])
def test_accepts_as_often_as_promised(num_drafts: int) -> None:
    """At least `1 - (1 - 1/k)^k` of the best, by theorem 3 of the paper, and never more than the best."""
    share = 1 - (1 - 1 / num_drafts) ** num_drafts
    for seed in range(5):
        target, draft = markov_chain(2 * seed)[0], markov_chain(100 + 2 * seed)[0]
        drafts = all_drafts(draft, num_drafts, with_replacement=True)
        acceptance = node_law(SpecTrRule(), target, drafts).acceptance
        best = best_acceptance(target, draft, num_drafts, with_replacement=True)
        assert share * best - 1e-6 < acceptance < best + 1e-6


def test_is_better_than_one_by_one_where_draft_and_target_differ() -> None:
    target, draft = markov_chain(3)[0], markov_chain(30)[0]
    drafts = all_drafts(draft, 4, with_replacement=True)
    spectr, strict = (node_law(rule, target, drafts).acceptance for rule in (SpecTrRule(), StrictRule()))
    assert spectr > strict + 0.02


def test_one_draft_is_judged_as_by_the_strict_rule() -> None:
    target, draft = markov_chain(3), markov_chain(30)
    tokens = torch.arange(len(target))[:, None] % target.shape[1]
    for with_replacement in (False, True):
        proposals = Proposals(tokens, torch.ones_like(tokens, dtype=torch.bool), draft, with_replacement)
        spectr, strict = (rule.judge(target, proposals) for rule in (SpecTrRule(), StrictRule()))
        assert torch.allclose(spectr.chances, strict.chances, atol=1e-6)
        assert torch.allclose(spectr.leftover, strict.leftover, atol=1e-6)


def test_disjoint_distributions_are_never_accepted() -> None:
    target, draft = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.3, 0.7])
    law = node_law(SpecTrRule(), target, all_drafts(draft, 3, with_replacement=True))
    assert law.acceptance == 0 and law.total_variation(target) == 0


def test_the_scale_is_the_smallest_that_overdraws_no_token() -> None:
    target, draft = markov_chain(3).double(), markov_chain(30).double()
    count = torch.arange(1, len(target) + 1)[:, None]
    scale = smallest_scale(target, draft, count)

    def excess(factor: torch.Tensor) -> torch.Tensor:
        single = torch.minimum(draft, target / factor).sum(dim=1, keepdim=True)
        return 1 - (1 - single) ** count - factor * single

    assert scale[0] == 1
    assert (excess(scale) < 1e-9).all()
    assert (excess(scale - 1e-3)[1:] > 0).all()


@pytest.mark.parametrize("draft", [None, torch.full((1, 4), 0.25)])
def test_refuses_proposals_of_another_kind(draft: torch.Tensor | None) -> None:
    proposals = Proposals(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool), draft)
    with pytest.raises(ValueError, match="StrictRule"):
        SpecTrRule().decide(torch.full((1, 4), 0.25), proposals, torch.zeros(1, 2))
