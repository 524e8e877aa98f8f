"""The walk down a tree, by rules whose decisions are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok.decoding.speculative.accept import Decision, Proposals
from vistok.decoding.speculative.lantern import LanternGreedyRule
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import GreedyRule, StrictRule
from vistok.decoding.speculative.tree import DraftTree
from vistok.decoding.speculative.verify import verify

#        0
#      1   2
#    3  4    5
PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2]])
TOKENS = torch.tensor([[0, 1, 2, 3, 4, 5]])


def make_tree(rows: int = 1, exists: Tensor | None = None, draft_probs: Tensor | None = None) -> DraftTree:
    there = torch.ones(rows, 6, dtype=torch.bool) if exists is None else exists
    return DraftTree(TOKENS.expand(rows, -1), PARENTS.expand(rows, -1), there, draft_probs)


def favourites(*tokens: int) -> Tensor:
    """A target whose most probable token after node i is `tokens[i]`, `[1 6 8]`."""
    return (torch.eye(8)[list(tokens)] * 4).softmax(dim=1)[None]


class Recorder:
    """Accepts children by their tokens and notes what it was shown."""

    is_lossless = False

    def __init__(self, *accepted: set[int]) -> None:
        self.accepted = accepted  # of each row
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def decide(self, target: Tensor, proposals: Proposals, uniforms: Tensor) -> Decision:
        self.seen.append((proposals.tokens, proposals.exists, uniforms))
        child = torch.full((len(target),), -1)
        tried = torch.zeros(len(target), dtype=torch.int64)
        for row, accepted in enumerate(self.accepted):
            for i in proposals.exists[row].nonzero()[:, 0].tolist():
                if child[row] < 0:
                    tried[row] += 1
                    if int(proposals.tokens[row, i]) in accepted:
                        child[row] = i
        return Decision(child, target, tried)


def test_every_row_walks_its_own_way():
    rule = Recorder({2, 5}, {1, 4}, set(), {3})
    uniforms = torch.arange(20.0).reshape(4, 5) / 20
    target = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    verified = verify(make_tree(4), target, rule, uniforms)
    assert verified.path.tolist() == [[0, 2, 5], [0, 1, 4], [0, -1, -1], [0, -1, -1]]
    assert verified.num_accepted.tolist() == [2, 2, 0, 0]
    for row, last in enumerate([5, 4, 0, 0]):
        assert torch.equal(verified.extra[row], target[row, last])
    second = rule.seen[1]
    assert second[1].tolist() == [[True, False], [True, True], [False, False], [False, False]]
    # Both children of the root were tried in the first row, one in the second.
    assert second[2][0, 0] == uniforms[0, 2] and second[2][1].tolist() == uniforms[1, 1:3].tolist()


def test_nodes_that_do_not_exist_are_not_tried():
    exists = torch.tensor([[True, False, True, False, False, False]])
    rule = Recorder({1, 2, 5})
    verified = verify(make_tree(exists=exists), favourites(0, 0, 0, 0, 0, 0), rule, torch.rand(1, 5))
    assert verified.path.tolist() == [[0, 2]] and verified.num_accepted.tolist() == [1]


def test_children_are_judged_by_what_they_were_drawn_from():
    draft = torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(1)).softmax(dim=2)

    class Looker(Recorder):
        def decide(self, target: Tensor, proposals: Proposals, uniforms: Tensor) -> Decision:
            drafts.append(proposals.draft)
            return super().decide(target, proposals, uniforms)

    drafts: list[Tensor | None] = []
    verify(make_tree(draft_probs=draft), favourites(0, 0, 0, 0, 0, 0), Looker({2}), torch.rand(1, 5))
    assert torch.equal(drafts[0], draft[:, 0]) and torch.equal(drafts[1], draft[:, 2])


@pytest.mark.parametrize("rule", [GreedyRule(), StrictRule()])
def test_a_root_alone_gives_the_token_after_it(rule):
    tree = DraftTree(torch.tensor([[3]]), torch.tensor([[-1]]), torch.ones(1, 1, dtype=torch.bool))
    target = favourites(6)
    verified = verify(tree, target, rule, torch.zeros(1, 0))
    assert verified.path.tolist() == [[0]] and verified.extra.argmax() == 6


@pytest.mark.parametrize(("ties", "expected"), [("node", [0, 1, 3]), ("leaf", [0, 2, 4])])
def test_a_greedy_lantern_takes_the_longest_path(ties, expected):
    #     0
    #   1   2
    #   3   4
    #   5
    parents = torch.tensor([[-1, 0, 0, 1, 2, 3]])
    tree = DraftTree(TOKENS, parents, torch.ones(1, 6, dtype=torch.bool))
    table = NeighbourTable(torch.tensor([[7], [2], [1], [4], [3], [0], [5], [0]], dtype=torch.int32))
    # Tokens 1 and 2, and 3 and 4, are neighbours whose mass together is the largest.
    target = torch.full((1, 6, 8), 0.01)
    target[:, 0, [1, 2, 7]] = torch.tensor([0.3, 0.3, 0.4])
    target[:, [1, 2], 3:5] = 0.5
    target[:, 3:, 6] = 0.9
    rule = LanternGreedyRule(table, 1, 1.0, ties)
    verified = verify(tree, target / target.sum(dim=2, keepdim=True), rule, torch.zeros(1, 5))
    assert verified.path.tolist() == [[*expected, -1]] and verified.num_accepted.tolist() == [2]
    assert verified.extra[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    shallow = torch.tensor([[True, True, True, False, True, False]])  # now only one path is two deep
    cut = verify(DraftTree(TOKENS, parents, shallow), target, rule, torch.zeros(1, 5))
    assert cut.path.tolist() == [[0, 2, 4]]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="target must be"):
        verify(make_tree(), torch.rand(1, 5, 8), StrictRule(), torch.rand(1, 5))
    with pytest.raises(ValueError, match="a tree of 5 proposals needs as many uniforms"):
        verify(make_tree(), torch.rand(1, 6, 8), StrictRule(), torch.rand(1, 4))
