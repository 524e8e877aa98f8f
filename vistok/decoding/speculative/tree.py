"""Draft trees as data: which tokens were proposed, what each follows, and what they were drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Path = tuple[int, ...]  # child ranks from the root down: (0, 2) is the third child of the root's first child


@lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Node ids as an int64 tensor that is made once and not changed: to bring them there makes the host wait."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class TreeBounds:
    """What holds for a tree whatever its tensors say, so that the host needs not look at them.

    Args:
        max_depth: no node is deeper below the root.
        max_children: no node has more children.
        is_chain: every node follows the one before it, and none is missing in between.
    """

    max_depth: int
    max_children: int
    is_chain: bool = False

    @classmethod
    def chain(cls, num_tokens: int) -> TreeBounds:
        """Of a chain of up to `num_tokens`."""
        return cls(num_tokens, min(num_tokens, 1), is_chain=True)


@dataclass(frozen=True)
class TreeShape:
    """A tree without tokens, of the same form in every row. Node 0 is the root, node i is at `paths[i - 1]`.

    Args:
        paths: one per node below the root, sorted by length, then lexicographically. Ranks of siblings count
            from 0 without a gap.

    Raises:
        ValueError: a path is empty, repeated, out of order, or neither it nor its siblings have a parent.
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        known: set[Path] = {()}
        if list(self.paths) != sorted(self.paths, key=lambda path: (len(path), path)):
            raise ValueError("the paths of a tree must be sorted by length, then by ranks; use TreeShape.of")
        for path in self.paths:
            if path in known:
                raise ValueError(f"path {path} is there twice, or is empty, which is the root's own")
            if path[:-1] not in known:
                raise ValueError(f"path {path} has no parent: add {path[:-1]}")
            if path[-1] != 0 and (*path[:-1], path[-1] - 1) not in known:
                raise ValueError(f"path {path} has no sibling before it: ranks count from 0 without a gap")
            known.add(path)

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]]) -> TreeShape:
        """From paths in any order."""
        return cls(tuple(sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))))

    @classmethod
    def chain(cls, num_tokens: int) -> TreeShape:
        """Every node has one child, `num_tokens` deep.

        Raises:
            ValueError: `num_tokens` is below 1.
        """
        if num_tokens < 1:
            raise ValueError(f"a chain has at least 1 token, got {num_tokens}")
        return cls.from_counts([[1]] * num_tokens)

    @classmethod
    def from_counts(cls, counts: Sequence[Sequence[int]]) -> TreeShape:
        """From the number of children of every node, level by level; the nodes that a level omits have none."""
        level: list[Path] = [()]
        paths: list[Path] = []
        for of_level in counts:
            if len(of_level) > len(level):
                raise ValueError(f"{len(of_level)} counts for a level of {len(level)} nodes")
            level = [
                (*path, rank) for path, count in zip(level, of_level, strict=False) for rank in range(count)
            ]
            paths += level
        return cls(tuple(paths))

    @property
    def num_nodes(self) -> int:
        """With the root."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Of the deepest node; the root's is 0."""
        return len(self.paths[-1]) if self.paths else 0

    @property
    def bounds(self) -> TreeBounds:
        """Of trees of this shape."""
        if self.depth == self.num_nodes - 1:
            return TreeBounds.chain(self.depth)
        return TreeBounds(self.depth, max(self.num_children))

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Of every node, -1 for the root."""
        ids = {path: node for node, path in enumerate([(), *self.paths])}
        return (-1, *(ids[path[:-1]] for path in self.paths))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The node ids of every depth, rising; the first is `(0,)`."""
        levels: list[list[int]] = [[] for _ in range(self.depth + 1)]
        for node, path in enumerate([(), *self.paths]):
            levels[len(path)].append(node)
        return tuple(tuple(level) for level in levels)

    @cached_property
    def num_children(self) -> tuple[int, ...]:
        """Of every node."""
        return tuple(self.parents.count(node) for node in range(self.num_nodes))

    def children(self, node: int) -> range:
        """Node ids, which follow on one another."""
        count = self.num_children[node]
        first = self.parents.index(node) if count else 0
        return range(first, first + count)


# Facts of the published drafters (Cai et al. 2024, Medusa; Li et al. 2024, EAGLE; Jang et al. 2025, LANTERN):
# how many children the nodes of every level have, starting with the root.
NAMED_SHAPES: dict[str, TreeShape] = {
    name: TreeShape.from_counts(counts)
    for name, counts in {
        "naive_extend_57": (
            (5,),
            (4, 3, 3, 2, 1),
            (4, 3, 3, 2, 2, 1, 0, 1),
            (4, 3, 2, 1, 2, 1, 0, 1),
            (3, 2, 0, 0, 2, 1, 0, 1),
        ),
        "mc_sim_7b_63": ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,)),
        "mc_sim_7b_63_balanced": ((3,), (3, 3, 2), (3, 2, 0, 2, 2), (3,), (2,)),
        "reverse_balanced_25": ((3,), (2, 1, 1), (3, 2, 1), (3, 2), (4, 3)),
        "medusa_2_7b_63": (
            (10,),
            (10, 5, 2, 2, 1, 1, 1, 1),
            (9, 4, 2, 1, 1, 1, 0, 0, 0, 0, 3, 1, 0, 0, 0, 1),
            (4, 1, 1, 0, 0, 0, 0, 0, 0, 1),
        ),
        "chain": ((1,),) * 5,
    }.items()
}


@dataclass(frozen=True)
class DraftTree:
    """Tokens proposed for the next positions of every row, as a tree below the last token that was drawn.

    Args:
        tokens: `[b t]` int64; node 0 is the root, whose token is not a proposal.
        parents: `[b t]` int64 node ids, -1 for the root alone. Parents come before children; siblings are
            visited by rising node id.
        exists: `[b t]`; False is padding, of rows with smaller trees.
        draft_probs: `[b t v]` float32, what the children of every node were drawn from, without replacement,
            in sibling order. `None`: the proposals are a deterministic function of the prefix.
        bounds: given by who built the tree and vouches for it; it is then not looked at, as that takes the host to wait
            for the device. `None`: the tree is checked.

    Raises:
        ValueError: shapes, types or devices that do not fit; of a tree that is checked, a root that is missing or not
            the only one, a parent that comes after its child, a node that exists below one that does not.
    """

    tokens: Tensor
    parents: Tensor
    exists: Tensor
    draft_probs: Tensor | None = None
    bounds: TreeBounds | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        if self.bounds is None:
            self._check_values()

    def _check_values(self) -> None:
        parents, exists = self.parents, self.exists
        node_ids = torch.arange(parents.shape[1], device=parents.device)
        above = exists.gather(1, parents.clamp(0, parents.shape[1] - 1))  # [b t]: whether the parent exists
        faults = {
            "node 0 is the root: its parent is -1 and it exists in every row": (parents[:, 0] != -1)
            | ~exists[:, 0],
            "the root is the only node without a parent": (parents[:, 1:] < 0).any(dim=1),
            "parents come before their children": (parents >= node_ids).any(dim=1),
            "the parent of a node that exists must exist": (exists & ~above).any(dim=1),
        }
        found = torch.stack(list(faults.values())).cpu()  # [faults b]: one transfer for all of them
        for rule, broken in zip(faults, found, strict=True):
            if broken.any():
                raise ValueError(f"not a tree in rows {broken.nonzero()[:, 0].tolist()}: {rule}")

    def _check_shapes(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape[1] < 1:
            raise ValueError(
                f"tokens must be [b t] with at least the root, got shape {tuple(self.tokens.shape)}"
            )
        for name, dtype in (("tokens", torch.int64), ("parents", torch.int64), ("exists", torch.bool)):
            part = getattr(self, name)
            if part.shape != self.tokens.shape or part.dtype != dtype or part.device != self.tokens.device:
                raise ValueError(
                    f"{name} must be {dtype} of shape {tuple(self.tokens.shape)} on {self.tokens.device}, "
                    f"got {part.dtype} of shape {tuple(part.shape)} on {part.device}"
                )
        probs = self.draft_probs
        if probs is not None and (probs.ndim != 3 or probs.shape[:2] != self.tokens.shape):
            raise ValueError(
                f"draft_probs must be [b t v] with b, t = {tuple(self.tokens.shape)}, "
                f"got shape {tuple(probs.shape)}; None says that the proposals were not drawn"
            )

    @cached_property
    def ancestors(self) -> Tensor:
        """`[b t t]` bool: entry (i, j) says that node j is node i or above it."""
        num_nodes = self.parents.shape[1]
        node_ids = torch.arange(num_nodes, device=self.parents.device)
        reach = (self.parents[:, :, None] == node_ids) | (node_ids[:, None] == node_ids)
        distance = 1  # reach holds all ancestors up to this distance; each squaring doubles it
        while distance < num_nodes - 1:
            reach = torch.bmm(reach.float(), reach.float()) > 0
            distance *= 2
        return reach

    @cached_property
    def depths(self) -> Tensor:
        """`[b t]` int64: steps below the root."""
        return self.ancestors.sum(dim=2) - 1

    @cached_property
    def limits(self) -> TreeBounds:
        """Its bounds; those of a tree that came without are looked up, which makes the host wait."""
        if self.bounds is not None:
            return self.bounds
        counts = torch.zeros_like(self.parents)
        counts.scatter_add_(1, self.parents[:, 1:], self.exists[:, 1:].long())
        depths = self.depths.masked_fill(~self.exists, 0)
        max_depth, max_children = torch.stack([depths.max(), counts.max()]).tolist()
        return TreeBounds(max_depth, max_children)

    @property
    def max_children(self) -> int:
        """No node has more children in any row."""
        return self.limits.max_children

    def children(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """The children of one node per row, in visiting order.

        Args:
            node: `[b]` int64; -1 has no children.

        Returns:
            `[b k]` node ids, 0 where there are no more, and `[b k]` whether they are there; k is `max_children`.
        """
        is_child = (self.parents == node[:, None]) & self.exists
        is_child[:, 0] = False  # the root is no child of -1
        nodes = (~is_child).long().argsort(dim=1, stable=True)[:, : self.max_children]
        exists = is_child.gather(1, nodes)
        return nodes.masked_fill(~exists, 0), exists

    def limited(self, max_depth: Tensor) -> DraftTree:
        """The same tree without the nodes below a depth, as at the end of an image.

        Args:
            max_depth: `[b]` int64, at least 0; 0 leaves the root.
        """
        return replace(self, exists=self.exists & (self.depths <= max_depth[:, None].clamp_min(0)))
