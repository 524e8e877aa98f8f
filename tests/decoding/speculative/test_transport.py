"""The best possible acceptance: a linear program, its dual by brute force, and every rule below it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.decoding.speculative.nodes import markov_chain
from vistok.decoding.speculative.laws import Drafts, all_drafts, node_law
from vistok.decoding.speculative.strict import StrictRule
from vistok.decoding.speculative.transport import best_acceptance, best_independent_acceptance


def dual_acceptance(target: Tensor, drafts: Drafts) -> float:
    """1 - the largest P(all drafts in H) - target(H), over all sets of tokens H."""
    worst = 0.0
    for inside in itertools.product([False, True], repeat=len(target)):
        chosen = torch.tensor(inside)
        drafted = float(drafts.weights[chosen[drafts.tokens].all(dim=1)].sum())
        worst = max(worst, drafted - float(target[chosen].double().sum()))
    return 1 - worst


@pytest.mark.parametrize("with_replacement", [False, True])
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_the_linear_program_agrees_with_its_dual(num_drafts: int, with_replacement: bool) -> None:
    for seed in range(3):
        target = markov_chain(2 * seed, num_removed=seed)[0]
        draft = markov_chain(100 + 2 * seed, num_removed=seed)[0]
        best = best_acceptance(target, draft, num_drafts, with_replacement=with_replacement)
        drafts = all_drafts(draft, num_drafts, with_replacement=with_replacement)
        assert best == pytest.approx(dual_acceptance(target, drafts), abs=1e-6)


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_the_closed_form_agrees_with_the_linear_program(num_drafts: int) -> None:
    target, draft = markov_chain(6, num_removed=2)[:4], markov_chain(60, num_removed=2)[:4]
    closed = best_independent_acceptance(target, draft, num_drafts)
    for row in range(4):
        best = best_acceptance(target[row], draft[row], num_drafts, with_replacement=True)
        assert float(closed[row]) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("with_replacement", [False, True])
def test_one_draft_is_judged_best_by_the_strict_rule(with_replacement: bool) -> None:
    target, draft = markov_chain(3)[0], markov_chain(30)[0]
    best = best_acceptance(target, draft, 1, with_replacement=with_replacement)
    assert best == pytest.approx(float(torch.minimum(target, draft).sum()), abs=1e-6)


@pytest.mark.parametrize("with_replacement", [False, True])
@pytest.mark.parametrize("num_drafts", [2, 3, 4])
def test_no_rule_is_better_than_the_best(num_drafts: int, with_replacement: bool) -> None:
    gaps = []
    for seed in range(5):
        target, draft = markov_chain(2 * seed)[0], markov_chain(100 + 2 * seed)[0]
        best = best_acceptance(target, draft, num_drafts, with_replacement=with_replacement)
        drafts = all_drafts(draft, num_drafts, with_replacement=with_replacement)
        gaps.append(best - node_law(StrictRule(), target, drafts).acceptance)
    assert min(gaps) > -1e-6
    assert max(gaps) > 0.01  # several drafts are not judged best one by one


def test_laws_of_a_sample_approach_those_of_all_drafts() -> None:
    target, draft = markov_chain(3)[0], markov_chain(30)[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(draft.expand(20_000, -1), 2, generator=generator)
    sampled = node_law(StrictRule(), target, Drafts.equally_probable(tokens, draft))
    exact = node_law(StrictRule(), target, all_drafts(draft, 2, with_replacement=False))
    assert sampled.acceptance == pytest.approx(exact.acceptance, abs=0.01)
    assert sampled.total_variation(target) < 0.01


def test_bad_input() -> None:
    target = torch.full((4,), 0.25)
    with pytest.raises(ValueError, match="shapes"):
        best_acceptance(target, torch.full((5,), 0.2), 1, with_replacement=True)
    with pytest.raises(ValueError, match="cannot draw 3 tokens from 2"):
        best_acceptance(target, torch.tensor([0.5, 0.5, 0, 0]), 3, with_replacement=False)
    with pytest.raises(ValueError, match="cannot draw 0"):
        all_drafts(target, 0, with_replacement=True)
    with pytest.raises(ValueError, match="too many"):
        best_acceptance(torch.full((1000,), 1e-3), torch.full((1000,), 1e-3), 3, with_replacement=True)
