"""Lossless rules keep the target's distribution; greedy ones its most probable token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.decoding.speculative.laws import p_value
from tests.decoding.speculative.nodes import NUM_CODES, draw, emit, joint_law, markov_chain, propose
from vistok.decoding.speculative.accept import JudgingRule, Proposals
from vistok.decoding.speculative.laws import Drafts, all_drafts, node_law
from vistok.decoding.speculative.spectr import SpecTrRule
from vistok.decoding.speculative.strict import GreedyRule, StrictRule

KINDS = {
    "deterministic": StrictRule(),
    "without replacement": StrictRule(),
    "with replacement": StrictRule(),
    "spectr": SpecTrRule(),
}
ROUNDING = 1e-6  # of float32 sums


def kind_of(case: str) -> str:
    return "with replacement" if case == "spectr" else case


class ForgetfulRule(StrictRule):
    """Broken: takes nothing out of the target."""

    def residual(self, target: Tensor, draft: Tensor | None, tokens: Tensor) -> Tensor:
        return target


class UnconditionalRule(StrictRule):
    """Broken: judges each child by the whole draft, though it was drawn without replacement."""

    def judge(self, target: Tensor, proposals: Proposals):
        return super().judge(
            target, Proposals(proposals.tokens, proposals.exists, proposals.draft, with_replacement=True)
        )


def drafts_of(case: str, draft: Tensor, num_children: int) -> Drafts:
    if case == "deterministic":
        return Drafts.certain(draft.topk(num_children).indices)
    return all_drafts(draft, num_children, with_replacement=kind_of(case) == "with replacement")


@pytest.mark.parametrize("num_removed", [0, 3])
@pytest.mark.parametrize("num_children", [1, 2, 3, 4])
@pytest.mark.parametrize("case", KINDS)
def test_what_comes_out_is_the_target_exactly(case: str, num_children: int, num_removed: int) -> None:
    """By enumeration of everything that can be drafted; filters have removed different tokens from both."""
    for seed in range(5):
        target = markov_chain(2 * seed, num_removed=num_removed)[0]
        draft = markov_chain(100 + 2 * seed, num_removed=num_removed)[0]
        law = node_law(KINDS[case], target, drafts_of(case, draft, num_children))
        assert law.total_variation(target) < ROUNDING
        assert law.tokens[target == 0].sum() == 0
        if num_children == 1 and case != "deterministic":
            assert law.acceptance == pytest.approx(float(torch.minimum(target, draft).sum()), abs=ROUNDING)


@pytest.mark.parametrize("num_removed", [0, 3])
@pytest.mark.parametrize("num_children", [1, 3])
@pytest.mark.parametrize("case", KINDS)
def test_two_tokens_in_a_row_follow_the_target(case: str, num_children: int, num_removed: int) -> None:
    target, draft = markov_chain(3, num_removed=num_removed), markov_chain(30, num_removed=num_removed)
    tokens = emit(KINDS[case], target, draft, num_children, kind_of(case))
    assert p_value(tokens, joint_law(target), NUM_CODES) > 1e-3


@pytest.mark.parametrize(
    ("rule", "num_children"), [(ForgetfulRule(), 1), (ForgetfulRule(), 3), (UnconditionalRule(), 3)]
)
def test_the_tests_catch_a_broken_rule(rule: JudgingRule, num_children: int) -> None:
    target, draft = markov_chain(3), markov_chain(30)
    tokens = emit(rule, target, draft, num_children, "without replacement")
    assert p_value(tokens, joint_law(target), NUM_CODES) < 1e-6
    drafts = all_drafts(draft[0], num_children, with_replacement=False)
    assert node_law(rule, target[0], drafts).total_variation(target[0]) > 0.01


def test_one_drawn_child_is_accepted_as_often_as_both_distributions_overlap() -> None:
    target, draft = markov_chain(5)[0].expand(40_000, -1), markov_chain(50)[0].expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)
    proposals = propose(draft, 1, "without replacement", generator)
    decision = StrictRule().decide(target, proposals, torch.rand(40_000, 1, generator=generator))
    overlap = float(torch.minimum(target[0], draft[0]).sum())
    assert float((decision.child == 0).float().mean()) == pytest.approx(overlap, abs=0.01)


def test_the_same_distribution_is_always_accepted() -> None:
    target = markov_chain(1)
    for case in ("without replacement", "with replacement", "spectr"):
        drafts = drafts_of(case, target[0], 2)
        assert node_law(KINDS[case], target[0], drafts).acceptance == pytest.approx(1, abs=ROUNDING)


def test_a_probability_of_zero_is_never_accepted() -> None:
    target = torch.tensor([[0.0, 1.0, 0.0]])
    tokens = torch.tensor([[0, 2]])
    for draft in (None, torch.tensor([[0.5, 0.0, 0.5]])):
        proposals = Proposals(tokens, torch.ones_like(tokens, dtype=torch.bool), draft)
        decision = StrictRule().decide(target, proposals, torch.zeros(1, 2))
        assert decision.child.tolist() == [-1]
        assert decision.leftover.tolist() == [[0.0, 1.0, 0.0]]


def test_no_token_is_emitted_that_rounding_alone_would_let_out() -> None:
    """A certain token is rejected by rounding: what is left has no mass, and must not be any token."""
    target = torch.tensor([[1 - 6e-8, 0.0, 0.0]])
    proposals = Proposals(torch.tensor([[0]]), torch.tensor([[True]]))
    decision = StrictRule().decide(target, proposals, torch.tensor([[1 - 6e-8]]))
    assert decision.child.tolist() == [-1]
    assert decision.leftover.argmax() == 0 and decision.leftover[0, 1:].sum() == 0


def test_a_child_that_cannot_have_been_drawn_is_passed_over() -> None:
    """It takes a uniform number, but what is known of the target stays as it is."""
    target, draft = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 0.5, 0.5]])
    exists = torch.tensor([[True, True]])
    both = Proposals(torch.tensor([[0, 1]]), exists, draft)
    alone = Proposals(torch.tensor([[1, 1]]), torch.tensor([[True, False]]), draft)
    decision = StrictRule().decide(target, both, torch.tensor([[0.0, 0.9]]))
    single = StrictRule().decide(target, alone, torch.tensor([[0.9, 0.0]]))
    assert decision.num_tried.tolist() == [2] and single.num_tried.tolist() == [1]
    assert torch.equal(decision.leftover, single.leftover)


def test_repeated_and_missing_children_take_no_uniform() -> None:
    target = torch.tensor([[0.2, 0.3, 0.5]]).expand(2, -1)
    tokens = torch.tensor([[0, 0, 1], [0, 1, 2]])
    exists = torch.tensor([[True, True, True], [True, False, True]])
    uniforms = torch.tensor([[0.9, 0.3, 0.9]]).expand(
        2, -1
    )  # 0 rejected; then 1 at 3/8, or 2 at 5/8, accepted
    decision = StrictRule().decide(target, Proposals(tokens, exists), uniforms)
    assert decision.child.tolist() == [2, 2]
    assert decision.num_tried.tolist() == [2, 2]


@pytest.mark.parametrize("case", [*KINDS, "greedy"])
def test_rows_do_not_depend_on_each_other(case: str) -> None:
    rule = KINDS.get(case, GreedyRule())
    kind = "deterministic" if case == "greedy" else kind_of(case)
    generator = torch.Generator().manual_seed(0)
    target, draft = markov_chain(3), markov_chain(30)
    proposals = propose(draft, 3, kind, generator)
    exists = torch.rand(proposals.exists.shape, generator=generator) < 0.7
    uniforms = torch.rand(len(target), 3, generator=generator)
    together = rule.decide(
        target, Proposals(proposals.tokens, exists, proposals.draft, proposals.with_replacement), uniforms
    )
    for i in range(len(target)):
        row = slice(i, i + 1)
        own = None if proposals.draft is None else proposals.draft[row]
        alone = rule.decide(
            target[row],
            Proposals(proposals.tokens[row], exists[row], own, proposals.with_replacement),
            uniforms[row],
        )
        assert torch.equal(alone.child, together.child[row])
        assert torch.equal(alone.num_tried, together.num_tried[row])
        assert torch.equal(alone.leftover, together.leftover[row])


@pytest.mark.parametrize("rule", [StrictRule(), SpecTrRule()])
def test_without_children_the_leftover_is_the_target(rule: JudgingRule) -> None:
    target = markov_chain(1)[:2]
    nobody = torch.zeros(2, 0, dtype=torch.int64)
    for proposals in (
        Proposals(nobody, nobody.bool(), target),
        Proposals(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.bool), target),
    ):
        decision = rule.decide(target, proposals, torch.zeros(2, 1))
        assert decision.child.tolist() == [-1, -1]
        assert decision.num_tried.tolist() == [0, 0]
        assert torch.equal(decision.leftover, target)


def test_greedy_takes_the_most_probable_token() -> None:
    target = torch.tensor([[0.1, 0.45, 0.45], [0.6, 0.2, 0.2], [0.2, 0.2, 0.6]])
    tokens = torch.tensor([[2, 1], [1, 2], [2, 0]])
    exists = torch.tensor([[True, True], [True, True], [False, True]])
    decision = GreedyRule().decide(target, Proposals(tokens, exists), torch.full((3, 2), 0.999))
    assert decision.child.tolist() == [1, -1, -1]
    assert decision.leftover.argmax(dim=1).tolist() == [1, 0, 2]
    assert decision.leftover.amax(dim=1).tolist() == [1, 1, 1]
    nobody = Proposals(tokens[:, :0], exists[:, :0])
    assert torch.equal(GreedyRule().decide(target, nobody, torch.zeros(3, 0)).leftover, decision.leftover)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, "int64"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "int64"),
        ({"exists": torch.ones(2, 2, dtype=torch.bool)}, "exists"),
        ({"exists": torch.ones(2, 3)}, "exists"),
        ({"draft": None, "with_replacement": True}, "with replacement"),
        ({"draft": torch.ones(3, 5)}, "draft"),
        ({"draft": torch.ones(2, 4)}, "same vocabulary"),
        ({"target": torch.ones(3, 5)}, "target"),
        ({"uniforms": torch.ones(2, 2)}, "uniforms"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    given = {
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "exists": torch.ones(2, 3, dtype=torch.bool),
        "draft": torch.full((2, 5), 0.2),
        "with_replacement": False,
        "target": torch.full((2, 5), 0.2),
        "uniforms": torch.zeros(2, 3),
    } | change
    target, uniforms = given.pop("target"), given.pop("uniforms")
    with pytest.raises(ValueError, match=message):
        StrictRule().decide(target, Proposals(**given), uniforms)


def test_draws_of_these_tests_are_one_after_another() -> None:
    """Without replacement, the first of two draws follows the draft."""
    draft = markov_chain(4)[0]
    tokens = draw(draft.expand(20_000, -1), torch.Generator().manual_seed(0), 2)
    assert p_value(tokens[:, :1], draft.double(), NUM_CODES) > 1e-3
    listed = all_drafts(draft, 2, with_replacement=False)
    law = torch.zeros(NUM_CODES**2, dtype=torch.float64)
    law[listed.tokens @ torch.tensor([NUM_CODES, 1])] = listed.weights
    assert p_value(tokens, law, NUM_CODES) > 1e-3
