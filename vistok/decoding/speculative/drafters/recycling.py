"""Token recycling: what the target thought likely after a token is proposed when that token comes again (Luo et al.
2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", section 3).

An adjacency matrix holds for every token its most probable successors at the last place where the target read it,
accepted or not. A tree of a fixed shape is read from it breadth first. The proposals are not drawn: the target accepts
each with its own probability of that token, so that flat distributions, as images have, gain little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.decoding.speculative.drafter import DraftStart, Outcome
from vistok.decoding.speculative.tree import DraftTree, TreeShape, on_device
from vistok.decoding.streams import UniformSource

UNKNOWN = -1
DEFAULT_SHAPE = TreeShape.from_counts([[6], [3, 2, 1, 1], [2, 1, 1]])


class RecyclingDrafter:
    """Proposes the successors that tokens had before. Every image has a matrix of its own, so that it does not depend on
    its neighbours in the batch.

    Args:
        shape: of the trees; a node whose successor is not known yet is missing.
        num_successors: kept for every token; 8 in the paper.
        successors: `[v num_successors]` int64, what the matrices begin with, such as `frequent_successors`; unknown
            ones are -1. By default nothing is known.

    Raises:
        ValueError: fewer successors than the shape has children, or `successors` of another size.
    """

    def __init__(
        self,
        shape: TreeShape = DEFAULT_SHAPE,
        *,
        num_successors: int = 8,
        successors: Tensor | None = None,
    ) -> None:
        if max(shape.num_children) > num_successors:
            raise ValueError(
                f"the shape has nodes of {max(shape.num_children)} children, num_successors {num_successors} is too few"
            )
        if successors is not None and successors.shape[1:] != (num_successors,):
            raise ValueError(f"successors must be [v {num_successors}], got {list(successors.shape)}")
        self.shape = shape
        self.num_successors = num_successors
        self.successors = successors

    def begin(self, start: DraftStart) -> RecyclingSession:
        """Start with a batch.

        Raises:
            ValueError: `num_successors` or `successors` do not fit the target's codebook.
        """
        codebook_size = start.target.codebook_size
        if self.num_successors > codebook_size:
            raise ValueError(
                f"num_successors {self.num_successors} is more than a codebook of {codebook_size}"
            )
        known = self.successors
        if known is None:
            known = torch.full((codebook_size, self.num_successors), UNKNOWN)
        if len(known) != codebook_size:
            raise ValueError(f"successors are of {len(known)} token ids, the target has {codebook_size}")
        known = known.to(start.reading.logits.device).repeat(start.batch_size, 1, 1)
        return RecyclingSession(self.shape, known)


class RecyclingSession:
    """The adjacency matrices of one batch, `[b v k]`, -1 where nothing is known."""

    num_passes = 0

    def __init__(self, shape: TreeShape, successors: Tensor) -> None:
        self.shape = shape
        self.successors = successors
        self.max_nodes = shape.num_nodes - 1

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        """The successors of the roots, their successors, and so on."""
        rows = torch.arange(len(roots), device=roots.device)
        tokens, exists = [roots], [torch.ones_like(roots, dtype=torch.bool)]
        for path, parent in zip(self.shape.paths, self.shape.parents[1:], strict=True):
            token = self.successors[rows, tokens[parent], path[-1]]
            exists.append(exists[parent] & (token != UNKNOWN))
            tokens.append(token.clamp_min(0))
        parents = on_device(self.shape.parents, roots.device).expand(len(roots), -1)
        return DraftTree(
            torch.stack(tokens, dim=1), parents, torch.stack(exists, dim=1), bounds=self.shape.bounds
        )

    def commit(self, outcome: Outcome) -> None:
        """Take up what the target thinks of all tokens that it read; of a token that it read twice, the later node's."""
        tokens = outcome.tree.tokens  # [b t]
        exists = outcome.tree.exists & (outcome.counts > 0)[:, None]
        same = (tokens[:, :, None] == tokens[:, None, :]) & exists[:, None, :]
        last = torch.where(same, torch.arange(tokens.shape[1], device=tokens.device), -1).amax(dim=2)  # [b t]
        best = outcome.logits.topk(self.successors.shape[2], dim=-1).indices  # [b t k]
        best = best.gather(1, last.clamp_min(0)[..., None].expand_as(best))
        places = tokens[..., None].expand_as(best)
        # All nodes of one token write the same: what the last of them says, or what was there if none exists.
        best = torch.where((last >= 0)[..., None], best, self.successors.gather(1, places))
        self.successors.scatter_(1, places, best)


def frequent_successors(indices: Tensor, codebook_size: int, num_successors: int = 8) -> Tensor:
    """The most frequent successors of every token in tokenized images.

    Args:
        indices: `[n t]` int64, one image per row.
        codebook_size: token ids.
        num_successors: how many.

    Returns:
        `[codebook_size num_successors]` int64 by decreasing frequency, -1 where fewer were seen.
    """
    pairs = indices[:, :-1].flatten() * codebook_size + indices[:, 1:].flatten()
    pairs, counts = pairs.unique(return_counts=True)
    by_count = counts.argsort(descending=True, stable=True)
    by_token = by_count[(pairs[by_count] // codebook_size).argsort(stable=True)]
    tokens, after = pairs[by_token] // codebook_size, pairs[by_token] % codebook_size
    starts = tokens.bincount(minlength=codebook_size).cumsum(dim=0) - tokens.bincount(minlength=codebook_size)
    rank = torch.arange(len(tokens), device=tokens.device) - starts[tokens]
    kept = rank < num_successors
    found = torch.full((codebook_size, num_successors), UNKNOWN, device=indices.device)
    found[tokens[kept], rank[kept]] = after[kept]
    return found
