"""LANTERN: what it merges, by hand; that it is exact with nothing to merge; how far it moves the target."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.decoding.speculative.laws import p_value
from tests.decoding.speculative.nodes import NUM_CODES, emit, joint_law, markov_chain, propose
from vistok.decoding.speculative.accept import Proposals
from vistok.decoding.speculative.lantern import LanternGreedyRule, LanternRule, Mode
from vistok.decoding.speculative.laws import Drafts, all_drafts, lantern_deviation, node_law
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import GreedyRule, StrictRule

LINE = torch.arange(4.0)[:, None] ** 1.1  # codes on a line: of 1, the nearest are 0, 2 and 3 in this order
TABLE = NeighbourTable.build(LINE, 3)
TARGET = torch.tensor([[0.3, 0.2, 0.1, 0.4]])
RANDOM = NeighbourTable.build(
    torch.randn(NUM_CODES, 3, generator=torch.Generator().manual_seed(0)), NUM_CODES - 1
)


def judge_token(rule: LanternRule, token: int, draft: Tensor | None = None) -> tuple[float, list[float]]:
    """The chance of one child and, rounded, the leftover."""
    proposals = Proposals(torch.tensor([[token]]), torch.tensor([[True]]), draft)
    judgement = rule.judge(TARGET, proposals)
    return float(judgement.chances), [round(probability, 4) for probability in judgement.leftover[0].tolist()]


def drafts_of(kind: str, draft: Tensor, num_children: int) -> Drafts:
    if kind == "deterministic":
        return Drafts.certain(draft.topk(num_children).indices)
    return all_drafts(draft, num_children, with_replacement=False)


@pytest.mark.parametrize(
    ("k", "delta", "mass"),
    [
        (0, 1.0, 0.0),
        (1, 0.29, 0.0),
        (1, 0.31, 0.3),  # the token itself does not count
        (3, 0.31, 0.3),
        (3, 0.41, 0.4),
        (2, 1.0, 0.4),
        (3, 1.0, 0.8),  # absolute: all fit
        (3, 1.001, 0.0),  # a factor from here on
        (3, 2.4, 0.0),
        (3, 2.6, 0.3),
        (3, 3.1, 0.4),
        (3, 5.1, 0.8),
    ],
)
def test_a_token_stands_for_its_nearest_codes_within_the_bound(k: int, delta: float, mass: float) -> None:
    chance, _ = judge_token(LanternRule(TABLE, k, delta), 1)
    assert chance == pytest.approx(0.2 + mass)


def test_a_rejection_takes_the_merged_codes_out_of_the_target() -> None:
    """Released: the k + 1 nearest, though only one was merged."""
    assert judge_token(LanternRule(TABLE, 2, 0.31), 1)[1] == [0, 0, 0.2, 0.8]
    assert judge_token(LanternRule(TABLE, 1, 0.31, "official"), 1)[1] == [0, 0, 0, 1]
    assert judge_token(LanternRule(TABLE, 1, 0.29, "official"), 1)[1] == [0.375, 0, 0.125, 0.5]


def test_a_rejected_draw_leaves_what_target_has_beyond_the_draft() -> None:
    """Released: neighbours keep their mass, as they are taken out of the draft."""
    draft = torch.tensor([[0.1, 0.7, 0.1, 0.1]])
    chance, leftover = judge_token(LanternRule(TABLE, 1, 0.31), 1, draft)
    assert chance == pytest.approx(0.5 / 0.7)
    assert leftover == [0, 0, 0, 1]
    chance, leftover = judge_token(LanternRule(TABLE, 1, 0.31, "official"), 1, draft)
    assert chance == pytest.approx(0.5 / 0.7)
    assert leftover == [0.4286, 0, 0.1429, 0.4286]  # [0.3 0 0.1 0.3]: two codes out of the draft


def test_only_the_released_rule_accepts_what_filters_removed_or_makes_up_tokens() -> None:
    target = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    proposals = Proposals(torch.tensor([[0]]), torch.tensor([[True]]))
    zeros = torch.zeros(1, 1)
    assert LanternRule(TABLE, 0, 0.5).decide(target, proposals, zeros).child.tolist() == [-1]
    assert LanternRule(TABLE, 0, 0.5, "official").decide(target, proposals, zeros).child.tolist() == [0]
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    released = LanternRule(TABLE, 0, 0.5, "official").judge(certain, proposals)
    assert released.leftover.tolist() == [[0.25] * 4]
    assert LanternRule(TABLE, 0, 0.5).judge(certain, proposals).leftover.tolist() == certain.tolist()


@pytest.mark.parametrize(("k", "delta"), [(0, 0.3), (0, 4.0), (5, 0.0)])
@pytest.mark.parametrize("kind", ["deterministic", "without replacement"])
def test_with_nothing_to_merge_it_is_the_strict_rule_to_the_bit(kind: str, k: int, delta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        target, draft = markov_chain(2 * seed, num_removed=2), markov_chain(100 + 2 * seed)
        proposals = propose(draft, 4, kind, generator)
        uniforms = torch.rand(len(target), 4, generator=generator)
        lantern = LanternRule(RANDOM, k, delta).decide(target, proposals, uniforms)
        strict = StrictRule().decide(target, proposals, uniforms)
        assert torch.equal(lantern.child, strict.child)
        assert torch.equal(lantern.num_tried, strict.num_tried)
        assert torch.equal(lantern.leftover, strict.leftover)


def test_the_released_rule_is_not_exact_at_delta_zero() -> None:
    """Neighbours without probability are merged, and others removed with them."""
    target, draft = markov_chain(3, num_removed=3)[0], markov_chain(30)[0]
    drafts = Drafts.certain(draft.topk(3).indices)
    mended, released = lantern_deviation(RANDOM, target, drafts, [4], [0.0]) + lantern_deviation(
        RANDOM, target, drafts, [4], [0.0], "official"
    )
    assert mended.total_variation < 1e-6
    assert released.total_variation > 0.05


def sweep(kind: str, mode: Mode, ks: list[int], deltas: list[float]) -> tuple[Tensor, Tensor]:
    """Acceptance and total variation, `[ks deltas]`, averaged over targets with two children."""
    total = torch.zeros(2, len(ks), len(deltas))
    for seed in range(10):
        target, draft = markov_chain(2 * seed)[0], markov_chain(100 + 2 * seed)[0]
        rows = lantern_deviation(RANDOM, target, drafts_of(kind, draft, 2), ks, deltas, mode)
        assert [(row.k, row.delta) for row in rows] == [(k, delta) for k in ks for delta in deltas]
        found = torch.tensor([(row.acceptance, row.total_variation) for row in rows])
        total += found.T.view_as(total) / 10
    return total[0], total[1]


@pytest.mark.parametrize("kind", ["deterministic", "without replacement"])
def test_it_accepts_more_and_moves_the_target_further_the_more_it_merges(kind: str) -> None:
    gained, moved = sweep(kind, "default", [0, 2, 5], [0.05, 0.2, 0.6])
    assert moved[0].max() < 1e-6
    for means in (gained, moved):
        assert (means[1:].diff(dim=1) > 0).all()
        assert (means.diff(dim=0) > -1e-6).all()
    assert moved[2, 2] > 0.2


def test_the_released_rule_moves_the_target_further() -> None:
    """Where deterministic proposals are rejected, as it removes codes that it did not merge."""
    settings = [1, 3], [0.05, 0.2, 0.6]
    mended, released = (sweep("deterministic", mode, *settings)[1] for mode in ("default", "official"))
    assert (released > mended).all()


def test_what_comes_out_can_be_further_from_the_target_than_delta() -> None:
    """Even with one drawn child: the bound is on one merge, and every token that is drawn has its own."""
    rows = []
    for seed in range(10):
        target, draft = markov_chain(2 * seed)[0], markov_chain(100 + 2 * seed)[0]
        rows += lantern_deviation(RANDOM, target, all_drafts(draft, 1, with_replacement=False), [5], [0.1])
    assert max(row.total_variation for row in rows) > 0.15


@pytest.mark.parametrize("mode", ["default", "official"])
def test_what_comes_out_agrees_with_the_computed_law(mode: Mode) -> None:
    """Two children per position, drawn many times; the law is not that of the target."""
    target, draft, rule = markov_chain(3), markov_chain(30), LanternRule(RANDOM, 3, 0.2, mode)
    tokens = emit(rule, target, draft, 2, "without replacement")[:, :1]
    law = node_law(rule, target[-1], all_drafts(draft[-1], 2, with_replacement=False)).tokens
    assert p_value(tokens, law, NUM_CODES) > 1e-3
    assert p_value(tokens, target[-1].double(), NUM_CODES) < 1e-6
    assert not rule.is_lossless


def test_the_exactness_test_catches_it() -> None:
    target, draft = markov_chain(3), markov_chain(30)
    tokens = emit(LanternRule(RANDOM, 2, 0.05), target, draft, 2, "without replacement")
    assert p_value(tokens, joint_law(target), NUM_CODES) < 1e-6


def test_greedy_lets_neighbours_win() -> None:
    """Of 0.3 0.2 0.1 0.4: token 1 wins with 0 merged into it, token 0 only with 1 as well."""
    children = Proposals(torch.tensor([[2, 0, 1]]), torch.ones(1, 3, dtype=torch.bool))
    rule = LanternGreedyRule(TABLE, 1, 0.31)
    assert rule.qualify(TARGET, children.tokens).tolist() == [[False, True, True]]
    decision = rule.decide(TARGET, children, torch.full((1, 3), 0.999))
    assert decision.child.tolist() == [1]
    assert decision.leftover.tolist() == [[0, 0, 0, 1]]
    strict = GreedyRule().decide(TARGET, children, torch.zeros(1, 3))
    exact = LanternGreedyRule(TABLE, 0, 1.0).decide(TARGET, children, torch.zeros(1, 3))
    assert strict.child.tolist() == exact.child.tolist() == [-1]
    assert torch.equal(strict.leftover, exact.leftover)


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = markov_chain(3), markov_chain(30)
    for rule in (LanternRule(RANDOM, 3, 0.2), LanternRule(RANDOM, 3, 3.0, "official")):
        proposals = propose(draft, 3, "without replacement", generator)
        uniforms = torch.rand(len(target), 3, generator=generator)
        together = rule.decide(target, proposals, uniforms)
        for i in range(len(target)):
            row = slice(i, i + 1)
            alone = Proposals(proposals.tokens[row], proposals.exists[row], draft[row])
            decision = rule.decide(target[row], alone, uniforms[row])
            assert torch.equal(decision.child, together.child[row])
            assert torch.equal(decision.leftover, together.leftover[row])


@pytest.mark.parametrize("rule", [LanternRule, LanternGreedyRule])
@pytest.mark.parametrize(
    ("k", "delta", "message"),
    [
        (-1, 0.1, "k must be from 0 to 3"),
        (4, 0.1, "k must be from 0 to 3"),
        (1, -0.1, "delta"),
        (1, math.nan, "delta"),
        (1, math.inf, "delta"),
    ],
)
def test_refuses_numbers_out_of_range(rule: type, k: int, delta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(TABLE, k, delta)


def test_refuses_tables_that_do_not_fit() -> None:
    narrow = NeighbourTable.build(LINE, 1)
    with pytest.raises(ValueError, match="this one has 1"):
        LanternRule(narrow, 2, 0.1)
    with pytest.raises(ValueError, match="needs a table of 2 neighbours"):
        LanternRule(narrow, 1, 0.1, "official")
    with pytest.raises(ValueError, match="mode"):
        LanternRule(TABLE, 1, 0.1, "released")  # type: ignore[arg-type]
    proposals = Proposals(torch.tensor([[0]]), torch.tensor([[True]]))
    for rule in (LanternRule(RANDOM, 1, 0.1), LanternGreedyRule(RANDOM, 1, 0.1)):
        with pytest.raises(ValueError, match="for 7 codes, the target has 4"):
            rule.decide(TARGET, proposals, torch.zeros(1, 1))
