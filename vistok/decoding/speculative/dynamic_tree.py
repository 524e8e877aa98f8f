"""Trees that follow the drafter's own probabilities (Li et al. 2024, "EAGLE-2", sections 4.1 and 4.2).

A candidate's score is the log-probability, under the drafter, of its whole path from the root. At every depth
the best candidates, the *beam*, are expanded; at the end the best of all candidates make the tree. The functions
here know no network: they take log-probabilities, level by level.

Proposals are a deterministic function of the prefix. Image distributions are flat, so at temperature 1 trees of
drawn tokens (`tree_drafting`) are accepted far more often; this one is for greedy or sharpened sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.speculative.tree import DraftTree, TreeBounds


@dataclass(frozen=True)
class DynamicTreeParams:
    """How large a tree grows.

    Args:
        top_k: width of the beam, and children per expanded node.
        depth: how often the beam is expanded; the deepest node is `depth + 1` below the root.
        total_tokens: nodes of the final tree, with the root.

    Raises:
        ValueError: a value outside its range, or more tokens than there are candidates.
    """

    top_k: int = 10
    depth: int = 4
    total_tokens: int = 59

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.depth < 0:
            raise ValueError(f"depth must be at least 0, which is a single level, got {self.depth}")
        if not 2 <= self.total_tokens <= self.num_candidates + 1:
            raise ValueError(
                f"total_tokens must be in 2..{self.num_candidates + 1}, the root and all candidates "
                f"of top_k {self.top_k} and depth {self.depth}; got {self.total_tokens}"
            )

    @property
    def num_candidates(self) -> int:
        """Below the root, of which the best are kept."""
        return self.top_k + self.depth * self.top_k**2


@dataclass(frozen=True)
class Candidates:
    """All nodes considered so far: level by level, inside a level by (beam rank of the parent, child rank).

    Args:
        tokens: `[b c]` int64.
        parents: `[b c]` int64, the parent's place among the candidates, -1 for the root.
        scores: `[b c]` float, at most 0; -inf where the drafter gives no probability at all.
        beam: `[b top_k]` int64, places of the candidates to be expanded next, by decreasing score.
        beam_parents: `[b top_k]` int64, the rank of their parents in the beam before; 0 at the first level.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    beam: Tensor
    beam_parents: Tensor

    @property
    def beam_tokens(self) -> Tensor:
        """`[b top_k]`"""
        return self.tokens.gather(1, self.beam)


def first_candidates(log_probs: Tensor, params: DynamicTreeParams) -> Candidates:
    """The children of the root.

    Args:
        log_probs: `[b v]`, of what follows the root, guided and filtered as the target's.
        params: how large the tree grows.

    Raises:
        ValueError: `top_k` is larger than the vocabulary.
    """
    scores, tokens = _best(log_probs, params.top_k)  # [b top_k]
    ranks = torch.arange(params.top_k, device=tokens.device).expand_as(tokens)
    return Candidates(tokens, torch.full_like(tokens, -1), scores, ranks, torch.zeros_like(tokens))


def expand_candidates(known: Candidates, log_probs: Tensor, params: DynamicTreeParams) -> Candidates:
    """Adds the best children of every node of the beam, and chooses the next beam among them.

    Args:
        known: before.
        log_probs: `[b top_k v]`, of what follows the nodes of the beam.
        params: how large the tree grows.

    Raises:
        ValueError: `log_probs` are not those of the beam.
    """
    if log_probs.shape[:2] != known.beam.shape:
        raise ValueError(
            f"log_probs must be [b top_k v] with b, top_k = {tuple(known.beam.shape)}, got {tuple(log_probs.shape)}"
        )
    gains, tokens = _best(log_probs, params.top_k)  # [b beam top_k]
    scores = (known.scores.gather(1, known.beam)[:, :, None] + gains).flatten(1)  # [b beam*top_k]
    parents = known.beam[:, :, None].expand_as(tokens).flatten(1)
    best = _ranked(scores)[:, : params.top_k]
    return Candidates(
        tokens=torch.cat([known.tokens, tokens.flatten(1)], dim=1),
        parents=torch.cat([known.parents, parents], dim=1),
        scores=torch.cat([known.scores, scores], dim=1),
        beam=best + known.tokens.shape[1],
        beam_parents=best // params.top_k,
    )


def select_tree(known: Candidates, roots: Tensor, params: DynamicTreeParams) -> DraftTree:
    """The best candidates as a tree, in the order in which they were enumerated.

    A child never scores above its parent, and of equals the one enumerated first, the parent, is taken: every
    chosen candidate has its parent in the tree. Candidates without probability are never chosen, so that a row
    with a strong filter has a smaller tree.

    Args:
        known: of all levels.
        roots: `[b]` int64, the tokens of the roots.
        params: how large the tree grows.
    """
    num_candidates = known.tokens.shape[1]
    best = _ranked(known.scores)[:, : params.total_tokens - 1]
    impossible = known.scores.gather(1, best).isneginf()
    chosen = best.masked_fill(impossible, num_candidates).sort(dim=1).values  # [b t-1]; impossible ones last
    exists = chosen < num_candidates
    chosen = chosen.clamp_max(num_candidates - 1)
    node_ids = torch.arange(1, chosen.shape[1] + 1, device=chosen.device).expand_as(chosen)
    # The entry behind the last candidate is the root's, which candidates call -1; padding is written there too.
    ids = chosen.new_zeros(len(roots), num_candidates + 1)
    ids.scatter_(1, chosen.masked_fill(~exists, num_candidates), node_ids * exists)
    ids[:, -1] = 0
    parents = ids.gather(1, known.parents.gather(1, chosen) % (num_candidates + 1))
    tokens = known.tokens.gather(1, chosen)
    root = torch.ones_like(roots[:, None])
    return DraftTree(
        tokens=torch.cat([roots[:, None], tokens * exists], dim=1),
        parents=torch.cat([-root, parents * exists], dim=1),
        exists=torch.cat([root.bool(), exists], dim=1),
        bounds=TreeBounds(
            min(params.depth + 1, params.total_tokens - 1), min(params.top_k, params.total_tokens - 1)
        ),
    )


def _best(log_probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the most probable tokens, `[... v]` -> `[... top_k]`."""
    if top_k > log_probs.shape[-1]:
        raise ValueError(f"top_k {top_k} is larger than the vocabulary of {log_probs.shape[-1]}")
    best = log_probs.topk(top_k, dim=-1)
    return best.values.clamp_max(0), best.indices  # rounding must not let a child score above its parent


def _ranked(scores: Tensor) -> Tensor:
    """Places by decreasing score, equals in rising order: `[b c]` -> `[b c]`."""
    return scores.argsort(dim=1, descending=True, stable=True)
