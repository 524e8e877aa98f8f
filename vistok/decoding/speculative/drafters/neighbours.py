"""Neighbour copies: the next token of a grid may be that of its left or its upper neighbour.

Neighbouring patches of an image are often alike; Speculative Jacobi Decoding starts its drafts with the same copies (Teng
et al. 2024, section 4.3, spatial locality). Here they are all of the draft: nothing is computed. The proposals
follow from the prefix, and the target accepts each with its own probability of that token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.decoding.speculative.drafter import DraftStart, Outcome
from vistok.decoding.speculative.tree import DraftTree, TreeShape, on_device
from vistok.decoding.streams import UniformSource

NEIGHBOURS = {  # rows up, columns to the left
    "left": (0, 1),
    "above": (1, 0),
    "above-left": (1, 1),
    "above-right": (1, -1),
}
DEFAULT_SHAPE = TreeShape.from_counts([[2], [2, 1], [1, 0, 1]])


class NeighbourDrafter:
    """Proposes the tokens of neighbours that are decided or drafted already.

    Args:
        shape: of the trees. The children of a node are the first different tokens among its successor's neighbours; a
            node is missing where there are not so many.
        neighbours: names of `NEIGHBOURS`, in the order in which they are tried.

    Raises:
        ValueError: an unknown neighbour, or fewer of them than the shape has children.
    """

    def __init__(
        self, shape: TreeShape = DEFAULT_SHAPE, neighbours: Sequence[str] = ("left", "above")
    ) -> None:
        for name in neighbours:
            if name not in NEIGHBOURS:
                raise ValueError(f"unknown neighbour {name!r}; choose among {', '.join(NEIGHBOURS)}")
        if max(shape.num_children) > len(neighbours):
            raise ValueError(
                f"the shape has nodes of {max(shape.num_children)} children, but there are {len(neighbours)} neighbours"
            )
        self.shape = shape
        self.neighbours = tuple(neighbours)

    def begin(self, start: DraftStart) -> NeighbourSession:
        """Start with a batch.

        Raises:
            ValueError: the tokens of the target do not lie on a grid of rows and columns.
        """
        grid = start.target.layout.grid
        if grid is None or len(grid) != 2:
            raise ValueError(
                f"neighbour copies need tokens on a grid, those of {type(start.target).__name__} are a "
                f"{start.target.layout}: choose another drafter"
            )
        offsets = [NEIGHBOURS[name] for name in self.neighbours]
        return NeighbourSession(self.shape, offsets, start, width=grid[1])


class NeighbourSession:
    """The tokens of one batch so far."""

    num_passes = 0

    def __init__(
        self, shape: TreeShape, offsets: Sequence[tuple[int, int]], start: DraftStart, *, width: int
    ) -> None:
        self.shape = shape
        self.offsets = offsets
        self.width = width
        self.max_nodes = shape.num_nodes - 1
        room = start.num_tokens + shape.depth + 1  # a draft may run over the end of an image
        device = start.reading.logits.device
        self.known = torch.zeros(start.batch_size, room, dtype=torch.int64, device=device)  # by position
        self.num_committed = torch.zeros(start.batch_size, dtype=torch.int64, device=device)

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        """Copies for the tokens after the roots."""
        self.num_committed = num_committed
        self.known.scatter_(1, num_committed[:, None], roots[:, None])
        shape = self.shape
        tokens, exists = [roots], [torch.ones_like(roots, dtype=torch.bool)]
        lines = [self.known]  # per node: the tokens of all positions up to it
        for node in range(shape.num_nodes):
            if shape.num_children[node] == 0:
                continue
            # Nodes come level by level, and siblings in a row: the children are the next that have no tokens yet.
            place = num_committed + (len(shape.paths[node - 1]) if node else 0) + 1  # [b], of the children
            found, is_found = self._copies(lines[node], place, shape.num_children[node])
            for token, is_there in zip(found.unbind(1), is_found.unbind(1), strict=True):
                tokens.append(token)
                exists.append(exists[node] & is_there)
                lines.append(lines[node].scatter(1, place[:, None], token[:, None]))
        parents = on_device(self.shape.parents, roots.device).expand(len(roots), -1)
        return DraftTree(
            torch.stack(tokens, dim=1), parents, torch.stack(exists, dim=1), bounds=self.shape.bounds
        )

    def _copies(self, line: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Different tokens of the neighbours of `place [b]`, `[b count]`, and whether there are so many."""
        tokens: list[Tensor] = []
        exists: list[Tensor] = []
        for up, left in self.offsets:
            row, column = place // self.width - up, place % self.width - left
            is_inside = (row >= 0) & (column >= 0) & (column < self.width)
            token = line.gather(1, (row * self.width + column).clamp_min(0)[:, None])[:, 0]
            for other, is_other in zip(tokens, exists, strict=True):
                is_inside = is_inside & ~(is_other & (other == token))
            tokens.append(token)
            exists.append(is_inside)
        found, is_found = torch.stack(tokens, dim=1), torch.stack(exists, dim=1)
        first = (~is_found).long().argsort(dim=1, stable=True)[:, :count]
        return found.gather(1, first), is_found.gather(1, first)

    def commit(self, outcome: Outcome) -> None:
        """Take up the accepted tokens."""
        path = outcome.path
        tokens = outcome.tree.tokens.gather(1, path.clamp_min(0))  # [b d]
        places = self.num_committed[:, None] + torch.arange(path.shape[1], device=path.device)
        is_new = torch.arange(path.shape[1], device=path.device) < outcome.counts[:, None]
        self.known.scatter_(1, places, torch.where(is_new, tokens, self.known.gather(1, places)))
