"""Draft trees against definitions by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok.decoding.speculative.tree import NAMED_SHAPES, DraftTree, TreeShape


def random_tree(batch_size: int, num_nodes: int, seed: int) -> DraftTree:
    """Any parents before their children; a fifth of the nodes is missing, with all below them."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.full((batch_size, num_nodes), -1)
    exists = torch.rand(batch_size, num_nodes, generator=generator) > 0.2
    exists[:, 0] = True
    for row in range(batch_size):
        for node in range(1, num_nodes):
            parents[row, node] = torch.randint(node, (), generator=generator)
            exists[row, node] &= exists[row, parents[row, node]]
    tokens = torch.randint(50, (batch_size, num_nodes), generator=generator)
    return DraftTree(tokens, parents, exists)


def path_up(parents: Tensor, node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 17, 40])
def test_ancestors_and_depths_by_walking_up(num_nodes: int) -> None:
    tree = random_tree(4, num_nodes, seed=num_nodes)
    for row in range(4):
        for node in range(num_nodes):
            path = path_up(tree.parents[row], node)
            assert tree.ancestors[row, node].nonzero()[:, 0].tolist() == sorted(path)
            assert tree.depths[row, node] == len(path) - 1


def test_ancestors_of_a_long_chain() -> None:
    num_nodes = 66
    parents = torch.arange(-1, num_nodes - 1)[None]
    tree = DraftTree(torch.zeros_like(parents), parents, torch.ones_like(parents, dtype=torch.bool))
    assert torch.equal(tree.ancestors[0], torch.ones(num_nodes, num_nodes).tril().bool())
    assert torch.equal(tree.depths[0], torch.arange(num_nodes))


def test_children_by_looking_at_every_node() -> None:
    tree = random_tree(5, 20, seed=0)

    def children_of(row: int, node: int) -> list[int]:
        return [i for i in range(1, 20) if tree.parents[row, i] == node and tree.exists[row, i]]

    most = max(len(children_of(row, node)) for row in range(5) for node in range(20))
    for nodes in ([0] * 5, [0, 3, 1, -1, 19], [7, 2, -1, 4, 0]):
        found, exists = tree.children(torch.tensor(nodes))
        assert found.shape == exists.shape == (5, most)
        for row, node in enumerate(nodes):
            expected = children_of(row, node) if node >= 0 else []
            assert found[row][exists[row]].tolist() == expected
            assert exists[row].tolist() == sorted(exists[row].tolist(), reverse=True)
            assert not found[row][~exists[row]].any()


def test_a_root_alone_has_no_children() -> None:
    tree = random_tree(2, 1, seed=0)
    nodes, exists = tree.children(torch.zeros(2, dtype=torch.int64))
    assert nodes.shape == exists.shape == (2, 0)


def test_limited_cuts_every_row_at_its_own_depth() -> None:
    tree = random_tree(4, 30, seed=1)
    limits = torch.tensor([0, 1, 3, 100])
    cut = tree.limited(limits)
    assert torch.equal(cut.exists, tree.exists & (tree.depths <= limits[:, None]))
    assert cut.exists[0].sum() == 1 and torch.equal(cut.exists[3], tree.exists[3])
    assert (cut.tokens == tree.tokens).all()
    assert cut.children(torch.zeros(4, dtype=torch.int64))[1][0].sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": [[-1, 0, 2]]}, "before their children"),
        ({"parents": [[-1, 0, 3]]}, "before their children"),
        ({"parents": [[-1, -1, 0]]}, "only node without a parent"),
        ({"parents": [[0, 0, 0]]}, "node 0 is the root"),
        ({"exists": [[False, False, False]]}, "node 0 is the root"),
        ({"exists": [[True, False, True]]}, "must exist"),
        ({"exists": [[1, 1, 1]]}, "exists must be torch.bool"),
        ({"parents": [[-1, 0]]}, "parents must be torch.int64"),
        ({"tokens": [[0.5, 1.0, 2.0]]}, "tokens must be torch.int64"),
        ({"tokens": [3, 4, 5]}, r"tokens must be \[b t\]"),
        ({"draft_probs": [[0.5, 0.5]]}, "draft_probs"),
    ],
)
def test_what_is_not_a_tree_is_refused(change: dict, message: str) -> None:
    parts = {"tokens": [[5, 6, 7]], "parents": [[-1, 0, 1]], "exists": [[True, True, True]]}
    DraftTree(**{name: torch.tensor(value) for name, value in parts.items()})
    with pytest.raises(ValueError, match=message):
        DraftTree(**{name: torch.tensor(value) for name, value in (parts | change).items()})


def test_the_row_that_is_no_tree_is_named() -> None:
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 2]])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        DraftTree(torch.zeros_like(parents), parents, torch.ones_like(parents, dtype=torch.bool))


def test_a_shape_numbers_its_nodes_by_length_then_rank() -> None:
    shape = TreeShape.of([(1,), (0, 0), (1, 1), (0,), (1, 0), (1, 0, 0)])
    assert shape.paths == ((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 0, 0))
    assert shape.parents == (-1, 0, 0, 1, 2, 2, 4)
    assert shape.levels == ((0,), (1, 2), (3, 4, 5), (6,))
    assert shape.num_children == (2, 1, 2, 0, 1, 0, 0)
    assert (shape.num_nodes, shape.depth) == (7, 3)
    assert [list(shape.children(node)) for node in range(7)] == [[1, 2], [3], [4, 5], [], [6], [], []]
    assert shape == TreeShape.from_counts([[2], [1, 2], [0, 1]])
    assert TreeShape(()).depth == 0 and TreeShape(()).levels == ((0,),)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (1, 0)], r"add \(1,\)"),
        ([(0,), (2,)], "without a gap"),
        ([(0,), (0,)], "twice"),
        ([(0,), ()], "root's own"),
        ([(-1,)], "without a gap"),
    ],
)
def test_what_is_not_a_shape_is_refused(paths: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape.of(paths)


def test_unsorted_paths_and_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted"):
        TreeShape(((0, 0), (0,)))
    with pytest.raises(ValueError, match="3 counts for a level of 2 nodes"):
        TreeShape.from_counts([[2], [1, 1, 1]])
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        TreeShape.chain(0)


def test_a_chain() -> None:
    assert TreeShape.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert NAMED_SHAPES["chain"] == TreeShape.chain(5)


@pytest.mark.parametrize(
    ("name", "num_paths", "depth", "num_leaves"),
    [
        ("naive_extend_57", 57, 5, 33),
        ("mc_sim_7b_63", 25, 5, 15),
        ("mc_sim_7b_63_balanced", 25, 5, 16),
        ("reverse_balanced_25", 25, 5, 15),
        ("medusa_2_7b_63", 63, 4, 42),
        ("chain", 5, 5, 1),
    ],
)
def test_named_shapes_have_the_published_sizes(
    name: str, num_paths: int, depth: int, num_leaves: int
) -> None:
    shape = NAMED_SHAPES[name]
    assert len(shape.paths) == num_paths
    assert shape.depth == depth
    assert shape.num_children.count(0) == num_leaves
