"""Dynamic growth against a slow search over lists."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vistok.decoding.speculative.dynamic_tree import (
    DynamicTreeParams,
    expand_candidates,
    first_candidates,
    select_tree,
)
from vistok.decoding.speculative.tree import DraftTree

VOCAB = 11


class ToyDrafter:
    """A distribution for every path, by hashing it; some tokens are impossible."""

    def __init__(self, row: int, num_impossible: int = 0) -> None:
        self.row = row
        self.num_impossible = num_impossible

    def __call__(self, path: tuple[int, ...]) -> Tensor:
        seed = hash((self.row, *path)) % 2**31
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(VOCAB, generator=generator).double() * 2
        banned = torch.randperm(VOCAB, generator=generator)[: self.num_impossible]
        return logits.index_fill(0, banned, -math.inf).log_softmax(dim=0)


def grow(drafters: list[ToyDrafter], params: DynamicTreeParams) -> DraftTree:
    known = first_candidates(torch.stack([draft(()) for draft in drafters]), params)
    for _ in range(params.depth):
        paths = [
            [candidate_path(known, row, int(place)) for place in places]
            for row, places in enumerate(known.beam)
        ]
        log_probs = [
            torch.stack([draft(path) for path in of_row])
            for draft, of_row in zip(drafters, paths, strict=True)
        ]
        known = expand_candidates(known, torch.stack(log_probs), params)
    return select_tree(known, torch.arange(len(drafters)) + 3, params)


def candidate_path(known, row: int, place: int) -> tuple[int, ...]:
    path: list[int] = []
    while place >= 0:
        path.insert(0, int(known.tokens[row, place]))
        place = int(known.parents[row, place])
    return tuple(path)


def slow_tree(draft: ToyDrafter, params: DynamicTreeParams) -> list[tuple[int, ...]]:
    """Paths of the nodes in the order of their ids, without the root."""
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(params.depth + 1):
        level = []
        for score, path in beam:
            best = sorted(enumerate(draft(path).tolist()), key=lambda pair: -pair[1])[: params.top_k]
            level += [(score + gain, (*path, token)) for token, gain in best]
        found += level
        beam = sorted(level, key=lambda pair: -pair[0])[: params.top_k]
    best_places = sorted(range(len(found)), key=lambda place: -found[place][0])[: params.total_tokens - 1]
    return [found[place][1] for place in sorted(best_places) if found[place][0] > -math.inf]


def paths_of(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        if tree.exists[row, node]:
            paths.append((*paths[int(tree.parents[row, node])], int(tree.tokens[row, node])))
    return paths[1:]


SETTINGS = [
    DynamicTreeParams(top_k=4, depth=3, total_tokens=20),
    DynamicTreeParams(top_k=5, depth=0, total_tokens=4),
    DynamicTreeParams(top_k=3, depth=2, total_tokens=22),
    DynamicTreeParams(top_k=1, depth=4, total_tokens=6),
]


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("num_impossible", [0, 5, 9])
def test_the_tree_is_that_of_a_slow_search(params: DynamicTreeParams, num_impossible: int) -> None:
    """With 9 of 11 tokens impossible, there are fewer candidates than nodes, and beams with nothing in them."""
    drafters = [ToyDrafter(row, num_impossible) for row in range(6)]
    tree = grow(drafters, params)
    assert tree.tokens.shape == (6, params.total_tokens)
    assert tree.draft_probs is None
    assert torch.equal(tree.tokens[:, 0], torch.arange(6) + 3)
    for row, draft in enumerate(drafters):
        assert paths_of(tree, row) == slow_tree(draft, params)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    params = SETTINGS[0]
    drafters = [ToyDrafter(0, 3), ToyDrafter(1, 9), ToyDrafter(2)]
    together = grow(drafters, params)
    for row, draft in enumerate(drafters):
        alone = grow([draft], params)
        assert torch.equal(alone.parents[0], together.parents[row])
        assert torch.equal(alone.exists[0], together.exists[row])
        assert torch.equal(alone.tokens[0, 1:], together.tokens[row, 1:])


def test_siblings_come_by_decreasing_probability() -> None:
    draft = ToyDrafter(0)
    tree = grow([draft], SETTINGS[0])
    nodes, exists = tree.children(torch.zeros(1, dtype=torch.int64))
    probs = draft(())[tree.tokens[0][nodes[0][exists[0]]]]
    assert len(probs) > 1 and (probs.diff() < 0).all()


def test_certain_tokens_keep_their_parents() -> None:
    """A token of probability 1 scores as its parent does, at every depth."""
    params = DynamicTreeParams(top_k=3, depth=3, total_tokens=4)
    log_probs = torch.full((1, VOCAB), -math.inf)
    log_probs[0, 5] = 0.0
    known = first_candidates(log_probs, params)
    for _ in range(3):
        known = expand_candidates(known, log_probs[:, None].expand(1, 3, VOCAB), params)
    tree = select_tree(known, torch.tensor([2]), params)
    assert tree.parents.tolist() == [[-1, 0, 1, 2]]
    assert tree.tokens.tolist() == [[2, 5, 5, 5]]
    assert tree.exists.all()


def test_rounding_above_zero_does_not_put_a_child_before_its_parent() -> None:
    params = DynamicTreeParams(top_k=1, depth=1, total_tokens=2)
    log_probs = torch.full((1, VOCAB), -math.inf)
    log_probs[0, 5] = 1e-6
    known = expand_candidates(first_candidates(log_probs, params), log_probs[:, None], params)
    assert select_tree(known, torch.tensor([2]), params).parents.tolist() == [[-1, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"depth": -1}, "depth must be at least 0"),
        ({"total_tokens": 1}, "total_tokens must be in 2..411"),
        ({"top_k": 2, "depth": 1, "total_tokens": 8}, "total_tokens must be in 2..7"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicTreeParams(**arguments)


def test_a_small_vocabulary_and_wrong_log_probs_are_refused() -> None:
    params = DynamicTreeParams()
    with pytest.raises(ValueError, match="top_k 10 is larger than the vocabulary of 9"):
        first_candidates(torch.zeros(1, 9), params)
    known = first_candidates(torch.zeros(2, 20), params)
    with pytest.raises(ValueError, match=r"\(2, 10\), got \(2, 9, 20\)"):
        expand_candidates(known, torch.zeros(2, 9, 20), params)
