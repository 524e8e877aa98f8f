"""Drafters that compute nothing: token recycling and neighbour copies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.drafter import DraftStart, Outcome
from vistok.decoding.speculative.drafters.neighbours import NeighbourDrafter
from vistok.decoding.speculative.drafters.recycling import RecyclingDrafter, frequent_successors
from vistok.decoding.speculative.tree import DraftTree, TreeShape
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Reading
from vistok.tokens import Layout

BINARY = TreeShape.from_counts([[2], [2, 2]])
STREAMS = ImageStreams.from_seeds([0])


def make_start(
    grid: tuple[int, ...] | None = (3, 4), codebook_size: int = 10, batch_size: int = 1
) -> DraftStart:
    """Of a target of which a drafter needs to know the sizes alone."""
    num_tokens = 12 if grid is None else int(torch.tensor(grid).prod())
    target = SimpleNamespace(codebook_size=codebook_size, num_tokens=num_tokens, layout=Layout(grid))
    reading = Reading(torch.zeros(batch_size, 1, 2), torch.zeros(batch_size, 1, codebook_size))
    labels = torch.zeros(batch_size, dtype=torch.int64)
    return DraftStart(target, labels, reading, torch.ones(num_tokens), SamplingParams(), False, batch_size)


def make_outcome(
    tree: DraftTree, path: list[list[int]], new_roots: list[int], logits: Tensor | None = None
) -> Outcome:
    paths = torch.tensor(path)
    if logits is None:
        logits = torch.zeros(*tree.tokens.shape, 10)
    counts = (paths >= 0).sum(dim=1)
    return Outcome(
        tree, Reading(logits, logits), logits, logits.softmax(dim=-1), paths, counts, torch.tensor(new_roots)
    )


def propose(session, root: int, position: int) -> DraftTree:
    return session.propose(torch.tensor([root]), torch.tensor([position]), STREAMS)


def existing(tree: DraftTree) -> list[int | None]:
    """The proposed tokens of the first row, `None` where a node is missing."""
    pairs = zip(tree.tokens[0, 1:].tolist(), tree.exists[0, 1:].tolist(), strict=True)
    return [token if exists else None for token, exists in pairs]


def fill(session, tokens: list[int]) -> None:
    """Images whose tokens are drawn one by one, each after a tree that was rejected."""
    for position, (root, following) in enumerate(zip(tokens, tokens[1:], strict=False)):
        tree = propose(session, root, position)
        session.commit(make_outcome(tree, [[0]], [following]))


def test_copies_come_from_the_left_and_from_above() -> None:
    session = NeighbourDrafter(BINARY).begin(make_start())
    fill(session, [0, 1, 2, 3, 4, 5])
    #  0 1 2 3
    #  4 5 . .   children of 5: left 5, above 2; after them left and above 3.
    assert existing(propose(session, 5, 5)) == [5, 2, 5, 3, 2, 3]


def test_a_row_begins_without_a_left_neighbour_and_the_first_row_has_none_above() -> None:
    session = NeighbourDrafter(BINARY).begin(make_start())
    assert existing(propose(session, 7, 0)) == [7, None, 7, None, None, None]
    fill(session, [0, 1, 2, 3])
    # Below the 3 a row begins: above it is the 0. Then left is the 0 just drafted, above the 1.
    assert existing(propose(session, 3, 3)) == [0, None, 0, 1, None, None]


def test_equal_neighbours_are_proposed_once() -> None:
    session = NeighbourDrafter(BINARY, ["left", "above", "above-left"]).begin(make_start())
    fill(session, [0, 1, 5, 3, 4, 5])
    # Left and above are both 5; the second child is the 1 above it to the left.
    assert existing(propose(session, 5, 5))[:2] == [5, 1]


def test_drafted_tokens_count_only_once_they_are_accepted() -> None:
    session = NeighbourDrafter(TreeShape.chain(2), ["above"]).begin(make_start((3, 2)))
    fill(session, [1, 2])
    tree = propose(session, 2, 1)
    assert existing(tree) == [1, 2]
    session.commit(make_outcome(tree, [[0, 1]], [8]))  # 1 accepted, 2 rejected
    assert existing(propose(session, 8, 3)) == [1, 8]


def test_a_batch_is_at_different_places() -> None:
    session = NeighbourDrafter(TreeShape.chain(1), ["above"]).begin(make_start((3, 2), batch_size=2))
    roots = torch.tensor([4, 5])
    tree = session.propose(roots, torch.tensor([0, 0]), STREAMS)
    session.commit(
        Outcome(tree, None, None, None, torch.tensor([[0], [-1]]), torch.tensor([1, 0]), torch.tensor([6, 5]))
    )
    tree = session.propose(torch.tensor([6, 5]), torch.tensor([1, 0]), STREAMS)
    assert tree.exists[:, 1].tolist() == [True, False] and tree.tokens[0, 1] == 4


def test_copies_need_a_grid() -> None:
    for grid in (None, (2, 3, 4)):
        with pytest.raises(ValueError, match="neighbour copies need tokens on a grid"):
            NeighbourDrafter().begin(make_start(grid))
    with pytest.raises(ValueError, match="unknown neighbour 'below'; choose among left, above"):
        NeighbourDrafter(neighbours=["below"])
    with pytest.raises(ValueError, match="nodes of 2 children, but there are 1 neighbours"):
        NeighbourDrafter(BINARY, ["left"])


def logits_with_best(best: list[list[int]]) -> Tensor:
    """`[1 t 10]`, of which each node's best tokens are these, by falling logit."""
    logits = torch.zeros(1, len(best), 10)
    for node, tokens in enumerate(best):
        for rank, token in enumerate(tokens):
            logits[0, node, token] = 9.0 - rank
    return logits


def test_nothing_is_proposed_before_a_token_was_seen() -> None:
    session = RecyclingDrafter(BINARY).begin(make_start())
    assert existing(propose(session, 3, 0)) == [None] * 6


def test_successors_are_those_that_the_target_thought_likely_last() -> None:
    session = RecyclingDrafter(BINARY, num_successors=2).begin(make_start())
    tree = propose(session, 3, 0)
    padding = [[0, 1]] * 6
    session.commit(make_outcome(tree, [[0]], [3], logits_with_best([[3, 5], *padding])))
    tree = propose(session, 3, 1)
    assert existing(tree) == [3, 5, 3, 5, None, None]  # after 5 nothing is known
    # Rejected nodes teach as well; of several nodes with a token, the last does.
    best = [[8, 9], [7, 8], [7, 8], [1, 2], [6, 4], *padding[:2]]
    session.commit(make_outcome(tree, [[0]], [5], logits_with_best(best)))
    assert existing(propose(session, 5, 2)) == [6, 4, None, None, None, None]
    assert existing(propose(session, 3, 2)) == [1, 2, None, None, None, None]


def test_matrices_can_start_from_successors_counted_before() -> None:
    images = torch.tensor([[1, 2, 1, 3, 1, 2], [2, 3, 3, 3, 0, 0]])
    counted = frequent_successors(images, 4, 2)
    assert counted.tolist() == [[0, -1], [2, 3], [1, 3], [3, 0]]
    session = RecyclingDrafter(BINARY, num_successors=2, successors=counted).begin(
        make_start(codebook_size=4)
    )
    assert existing(propose(session, 1, 0)) == [2, 3, 1, 3, 3, 0]
    logits = torch.zeros(1, 7, 4)
    session.commit(make_outcome(propose(session, 1, 0), [[0]], [1], logits))
    assert counted.tolist() == [[0, -1], [2, 3], [1, 3], [3, 0]]  # a session learns for itself


def test_successors_must_fit() -> None:
    with pytest.raises(ValueError, match="nodes of 2 children, num_successors 1 is too few"):
        RecyclingDrafter(BINARY, num_successors=1)
    with pytest.raises(ValueError, match=r"successors must be \[v 8\], got \[10, 3\]"):
        RecyclingDrafter(BINARY, successors=torch.zeros(10, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_successors 11 is more than a codebook of 10"):
        RecyclingDrafter(BINARY, num_successors=11).begin(make_start())
    with pytest.raises(ValueError, match="successors are of 9 token ids, the target has 10"):
        RecyclingDrafter(BINARY, successors=torch.zeros(9, 8, dtype=torch.int64)).begin(make_start())
