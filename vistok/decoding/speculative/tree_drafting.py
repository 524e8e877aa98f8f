"""Growing draft trees level by level, with any drafter.

A drafter says what follows the nodes of a level (`Expand`); here it is decided which tokens become nodes. Trees of
a fixed shape are drawn from the drafter's distribution without replacement (Li et al. 2024, "EAGLE"; Jeon et al.
2024, "Recursive Speculative Decoding") or take its most probable tokens; dynamic trees follow its probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.dynamic_tree import (
    DynamicTreeParams,
    expand_candidates,
    first_candidates,
    select_tree,
)
from vistok.decoding.speculative.tree import DraftTree, TreeShape, on_device
from vistok.decoding.streams import UniformSource


@dataclass(frozen=True)
class Level:
    """Nodes of one depth that a drafter is to expand, the same number in every row.

    A node that a row lacks is there with some token of the vocabulary; what is said about it is ignored.

    Args:
        tokens: `[b n]` int64.
        parents: `[b n]` int64, their parents' places in the level expanded before; 0, the root, at depth 1.
        ancestors: `[b n s]` bool, over all nodes expanded in this tree so far in the order of the calls, this
            level's being the last n: which of them are the node itself or above it. The root is not counted.
        depth: steps below the root, at least 1.
    """

    tokens: Tensor
    parents: Tensor
    ancestors: Tensor
    depth: int

    def below(self, tokens: Tensor, parents: Tensor) -> Level:
        """The next level; `parents` are places in this one."""
        index = parents[:, :, None].expand(-1, -1, self.ancestors.shape[2])
        above = self.ancestors.gather(1, index)
        return Level(tokens, parents, torch.cat([above, _identity(tokens)], dim=2), self.depth + 1)


def first_level(tokens: Tensor) -> Level:
    """Children of the root, `[b n]`."""
    return Level(tokens, torch.zeros_like(tokens), _identity(tokens), depth=1)


def _identity(tokens: Tensor) -> Tensor:
    eye = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return eye.expand(len(tokens), -1, -1)


# What follows the nodes of a level: probabilities [b n v] float32, guided and filtered like the target's. The drafter
# keeps its own state, such as keys and features of the nodes, for the level below.
Expand = Callable[[Level], Tensor]


class Choose(Protocol):
    """Which tokens become the children of a level's inner nodes."""

    def __call__(self, probs: Tensor, children: Sequence[range]) -> tuple[Tensor, Tensor]:
        """From `probs [b n v]` and the ids of the children of each of the n nodes.

        Returns:
            `[b n k]` tokens and whether they are there, for k at least the most children.
        """
        ...


class TreeDrafting(Protocol):
    """A way of growing trees."""

    @property
    def max_nodes(self) -> int:
        """The most nodes below a root."""
        ...

    def grow(self, roots: Tensor, root_probs: Tensor, expand: Expand, streams: UniformSource) -> DraftTree:
        """Propose what follows the roots.

        Args:
            roots: `[b]` int64, tokens.
            root_probs: `[b v]` float32, what follows them, guided and filtered like the target's.
            expand: called once per level below the root that has children.
            streams: randomness of the draws, always as much.
        """
        ...


@dataclass(frozen=True)
class SampledDrafting:
    """A tree of a fixed shape; the children of a node are drawn one after the other, without replacement."""

    shape: TreeShape

    @property
    def max_nodes(self) -> int:
        return self.shape.num_nodes - 1

    def grow(self, roots: Tensor, root_probs: Tensor, expand: Expand, streams: UniformSource) -> DraftTree:
        uniforms = streams.uniform(self.max_nodes).to(root_probs.device, non_blocking=True)

        def draw(probs: Tensor, children: Sequence[range]) -> tuple[Tensor, Tensor]:
            return draw_without_replacement(probs, _per_child(uniforms, children))

        return grow_static(roots, root_probs, self.shape, expand, draw)


@dataclass(frozen=True)
class TopDrafting:
    """A tree of a fixed shape; the children of a node are its most probable tokens."""

    shape: TreeShape

    @property
    def max_nodes(self) -> int:
        return self.shape.num_nodes - 1

    def grow(self, roots: Tensor, root_probs: Tensor, expand: Expand, streams: UniformSource) -> DraftTree:
        tree = grow_static(roots, root_probs, self.shape, expand, top_tokens)
        return replace(tree, draft_probs=None)


@dataclass(frozen=True)
class DynamicDrafting:
    """A tree that follows the drafter's probabilities; see `dynamic_tree`."""

    params: DynamicTreeParams = field(default_factory=DynamicTreeParams)

    @property
    def max_nodes(self) -> int:
        return self.params.total_tokens - 1

    def grow(self, roots: Tensor, root_probs: Tensor, expand: Expand, streams: UniformSource) -> DraftTree:
        _check_probs(root_probs, roots.shape)
        known = first_candidates(root_probs.log(), self.params)
        level = first_level(known.beam_tokens)
        for step in range(self.params.depth):
            if step > 0:
                level = level.below(known.beam_tokens, known.beam_parents)
            probs = expand(level)
            _check_probs(probs, level.tokens.shape)
            known = expand_candidates(known, probs.log(), self.params)
        return select_tree(known, roots, self.params)


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether the target always takes its most probable token."""
    return sampling.top_k == 1


def static_drafting(shape: TreeShape, sampling: SamplingParams) -> TreeDrafting:
    """Draws for a target that samples; the most probable tokens for a greedy one."""
    return TopDrafting(shape) if is_greedy(sampling) else SampledDrafting(shape)


def drafter_sampling(sampling: SamplingParams) -> SamplingParams:
    """How a drafter filters: like the target; for a greedy target not at all, as one token would be left."""
    return SamplingParams() if is_greedy(sampling) else sampling


def grow_static(
    roots: Tensor, root_probs: Tensor, shape: TreeShape, expand: Expand, choose: Choose
) -> DraftTree:
    """A tree of a fixed shape.

    Args:
        roots: `[b]` int64, tokens.
        root_probs: `[b v]` float32, what follows them.
        shape: which nodes there are.
        expand: called once per level below the root that has children, with its inner nodes only.
        choose: which tokens become nodes; it must draw from the given distributions if `draft_probs` is to be true.

    Returns:
        The tree with `draft_probs`, which are zero at leaves. A node is missing where `choose` found too few
        tokens, with all below it.

    Raises:
        ValueError: distributions of another shape than asked for.
    """
    _check_probs(root_probs, roots.shape)
    device = roots.device
    tokens = torch.zeros(len(roots), shape.num_nodes, dtype=torch.int64, device=device)
    exists = torch.zeros_like(tokens, dtype=torch.bool)
    draft_probs = root_probs.new_zeros(len(roots), shape.num_nodes, root_probs.shape[-1])
    tokens[:, 0], exists[:, 0] = roots, True
    level: Level | None = None
    above: tuple[int, ...] = (0,)
    for depth in range(shape.depth):
        inner = tuple(node for node in shape.levels[depth] if shape.num_children[node])
        probs = root_probs[:, None]
        if depth > 0:
            level = _level_of(shape, inner, above, tokens, level)
            probs = expand(level)
            _check_probs(probs, level.tokens.shape)
        draft_probs[:, on_device(inner, device)] = probs
        children = [shape.children(node) for node in inner]
        chosen, there = choose(probs, children)
        for place, (node, ids) in enumerate(zip(inner, children, strict=True)):
            tokens[:, ids.start : ids.stop] = chosen[:, place, : len(ids)]
            exists[:, ids.start : ids.stop] = there[:, place, : len(ids)] & exists[:, node, None]
        above = inner
    parents = on_device(shape.parents, device).expand_as(tokens)
    return DraftTree(tokens * exists, parents, exists, draft_probs, shape.bounds)


def _level_of(
    shape: TreeShape, nodes: Sequence[int], above: Sequence[int], tokens: Tensor, level: Level | None
) -> Level:
    """The nodes as a level below `above`, the nodes of the level before."""
    level_tokens = tokens[:, on_device(tuple(nodes), tokens.device)]
    if level is None:
        return first_level(level_tokens)
    places = tuple(above.index(shape.parents[node]) for node in nodes)
    return level.below(level_tokens, on_device(places, tokens.device).expand(len(tokens), -1))


def top_tokens(probs: Tensor, children: Sequence[range]) -> tuple[Tensor, Tensor]:
    """The most probable tokens, by decreasing probability; see `Choose`."""
    best = probs.topk(max(map(len, children)), dim=-1)
    return best.indices, best.values > 0


def draw_without_replacement(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens one after the other, each from what the ones before it left, by inverting the cumulative.

    Args:
        probs: `[... v]`.
        uniforms: `[... k]` in [0, 1), one per draw.

    Returns:
        `[... k]` int64 tokens, and `[... k]` whether they are there: a draw finds none when no token with
        probability is left.
    """
    left = probs.double()
    tokens, exists = [], []
    for uniform in uniforms.double().unbind(dim=-1):
        cumulative = left.cumsum(dim=-1)  # [... v]
        total = cumulative[..., -1:]
        # right=True: a token without probability has an empty interval and is never drawn.
        token = torch.searchsorted(cumulative, uniform[..., None] * total, right=True)
        token = token.clamp_max(probs.shape[-1] - 1)  # [... 1]
        left = left.scatter(-1, token, 0.0)
        tokens.append(token)
        exists.append(total > 0)
    return torch.cat(tokens, dim=-1), torch.cat(exists, dim=-1)


def _per_child(uniforms: Tensor, children: Sequence[range]) -> Tensor:
    """Node i has number i - 1 of its row: `[b t-1]` -> `[b n k]`, where what is beyond a node's children is unused."""
    most = max(map(len, children))
    ids = tuple((*(node - 1 for node in of_node), *[0] * (most - len(of_node))) for of_node in children)
    return uniforms[:, on_device(ids, uniforms.device)]


def _check_probs(probs: Tensor, nodes: Sequence[int]) -> None:
    if probs.shape[:-1] != tuple(nodes) or probs.dtype != torch.float32:
        raise ValueError(
            f"a drafter must give one float32 distribution per node, {[*nodes, 'v']}, "
            f"got {probs.dtype} {list(probs.shape)}"
        )
