"""Goldens of LANTERN's draft trees: shapes, growth from recorded logits, and growth with the drafter network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from tests.golden_checks.lantern_eagle import load
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.drafter import DraftStart, Outcome
from vistok.decoding.speculative.dynamic_tree import (
    DynamicTreeParams,
    expand_candidates,
    first_candidates,
    select_tree,
)
from vistok.decoding.speculative.eagle import EagleSession
from vistok.decoding.speculative.tree import NAMED_SHAPES, DraftTree, TreeShape
from vistok.decoding.speculative.tree_drafting import (
    DynamicDrafting,
    Expand,
    Level,
    TopDrafting,
    TreeDrafting,
    drafter_sampling,
    grow_static,
    top_tokens,
)
from vistok.decoding.streams import ImageStreams, UniformSource
from vistok.models.generators.base import NextTokenGenerator, Reading

NUM_DRAWS = 10  # per expanded node, of which the release uses as many as the node has children
CONDITION_LENGTH = 120


def check_static_trees(case: GoldenCase) -> Comparison:
    """The index tables of all named trees, which we do not need but can compute."""
    comparison = Comparison()
    assert case.meta["trees"].keys() == NAMED_SHAPES.keys()
    for name, published in case.meta["trees"].items():
        shape = NAMED_SHAPES[name]
        paths = [[int(rank) for rank in path.split(".")] for path in published["paths"]]
        comparison.compare(f"paths/{name}", torch.tensor(shape == TreeShape.of(paths)), torch.tensor(True))
        for table, actual in _tables(shape).items():
            key = f"{name}/{table}"
            expected = case.outputs[key]
            if table == "parent_row_index":  # padding is meaningless
                is_node = case.outputs[f"{name}/retrieve_indices"] >= 0
                actual, expected = (part.masked_fill(~is_node, 0) for part in (actual, expected))
            comparison.compare(f"outputs/{key}", actual.to(expected.dtype), expected)
    return comparison


def _tables(shape: TreeShape) -> dict[str, Tensor]:
    levels: list[Level] = []

    def expand(level: Level) -> Tensor:
        levels.append(level)
        return torch.full((*level.tokens.shape, NUM_DRAWS), 0.1)

    tree = grow_static(torch.zeros(1).long(), torch.full((1, NUM_DRAWS), 0.1), shape, expand, top_tokens)
    rows = leaf_rows(tree)
    inner = _inner(shape)
    expanded = [node for level in inner for node in level]
    place = {node: i for level in inner for i, node in enumerate(level)}
    ranks = {node: shape.paths[node - 1][-1] for node in range(1, shape.num_nodes)}
    tables = {
        "retrieve_indices": rows,
        "tree_mask": tree.ancestors[0],
        "tree_position_ids": tree.depths[0],
        "tree_indices": torch.tensor(
            [0, *(1 + NUM_DRAWS * expanded.index(shape.parents[node]) + rank for node, rank in ranks.items())]
        ),
        "parent_row_index": torch.tensor(
            [[place[shape.parents[node]] if node > 0 else -1 for node in row] for row in rows.tolist()]
        ),
        "earlier_siblings": _earlier_siblings(tree, rows),
    }
    for i, level in enumerate(levels):
        chosen = [NUM_DRAWS * place[shape.parents[node]] + ranks[node] for node in inner[i + 1]]
        tables[f"draft_level_{i}_select"] = torch.tensor(chosen)
        tables[f"draft_level_{i}_repeat"] = level.parents[0].unique_consecutive(return_counts=True)[1]
        tables[f"draft_level_{i}_mask"] = level.ancestors[0]
    return tables


def _earlier_siblings(tree: DraftTree, rows: Tensor) -> Tensor:
    """Of every node of every leaf row, `[r d k-1]`, filled up with -1."""
    table = torch.full((*rows.shape, max(1, tree.max_children - 1)), -1)
    for place in (rows > 0).nonzero().tolist():
        node = rows[tuple(place)]
        siblings, exists = tree.children(tree.parents[:, int(node)])
        earlier = siblings[exists & (siblings < node)]
        table[tuple(place)][: len(earlier)] = earlier
    return table


def leaf_rows(tree: DraftTree, by_leaf: bool = False) -> Tensor:
    """Node ids from the root to every leaf of row 0, filled up with -1: by rising ids from the root on, or of the leaf."""
    rows = []
    for node in range(tree.tokens.shape[1]):
        if tree.exists[0, node] and not tree.children(torch.tensor([node]))[1].any():
            rows.append(tree.ancestors[0, node].nonzero()[:, 0].tolist())
    if not by_leaf:
        rows.sort()  # no row is the beginning of another: what it is filled up with does not matter
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


@torch.inference_mode()
def check_dynamic_tree(case: GoldenCase) -> Comparison:
    """From the recorded logits, and from the weights on."""
    comparison = Comparison()
    for number, settings in enumerate(case.meta["settings"]):
        params = DynamicTreeParams(settings["top_k"], settings["depth"], settings["total_tokens"])
        sampling = _sampling(settings)
        start, rounds = _rounds(case, [DynamicDrafting(params)] * 2, sampling)
        for turn, tree in enumerate(rounds):
            name = f"s{number}_r{turn}"
            recorded = [case.intermediate[f"{name}/level_logits_{i}"] for i in range(params.depth + 1)]
            pure = _grow_from_logits(recorded, tree.tokens[:, 0], params, drafter_sampling(sampling))
            for part, one in (("outputs", tree), ("pure", pure)):
                _compare_tree(comparison, case, f"{part}/{name}", one, by_leaf=settings["temperature"] == 0)
            for level, logits in enumerate(start.take()):
                key = f"{name}/level_logits_{level}"
                comparison.compare(f"intermediate/{key}", logits[0], case.intermediate[key])
                key = f"{name}/level_logits_warped_{level}"
                if key in case.intermediate:
                    comparison.compare(
                        f"intermediate/{key}", _warped(logits[0], sampling), case.intermediate[key]
                    )
    return comparison


def _grow_from_logits(
    recorded: Sequence[Tensor], roots: Tensor, params: DynamicTreeParams, sampling: SamplingParams
) -> DraftTree:
    log_probs = [token_probabilities(logits, sampling).log() for logits in recorded]
    known = first_candidates(log_probs[0], params)
    for of_level in log_probs[1:]:
        known = expand_candidates(known, of_level[None], params)
    return select_tree(known, roots, params)


def _compare_tree(
    comparison: Comparison, case: GoldenCase, name: str, tree: DraftTree, by_leaf: bool
) -> None:
    found = {
        "draft_tokens": tree.tokens[0],
        "retrieve_indices": leaf_rows(tree, by_leaf),
        "tree_mask": tree.ancestors[0],
        "tree_position_ids": tree.depths[0],
    }
    for key, actual in found.items():
        expected = case.outputs[f"{name.split('/')[1]}/{key}"]
        comparison.compare(f"{name}/{key}", actual.to(expected.dtype), expected)


@torch.inference_mode()
def check_static_draft(case: GoldenCase) -> Comparison:
    """With the recorded draws in place of ours, and with the most probable tokens."""
    comparison = Comparison()
    for number, settings in enumerate(case.meta["settings"]):
        shape = NAMED_SHAPES[settings["tree"]]
        sampled = [case.inputs.get(f"s{number}_r{turn}/sampled_tokens") for turn in range(2)]
        growers = [TopDrafting(shape) if draws is None else Replay(shape, draws) for draws in sampled]
        start, rounds = _rounds(case, growers, _sampling(settings))
        for turn, (tree, draws) in enumerate(zip(rounds, sampled, strict=True)):
            name = f"s{number}_r{turn}"
            logits = torch.cat([level[0] for level in start.take()])  # [expanded nodes, v]
            found = {"tree_tokens": tree.tokens[0], "candidates": _along(leaf_rows(tree), tree.tokens[0], -1)}
            if draws is None:
                best = logits.topk(NUM_DRAWS, dim=1)
                found |= {"topk_logits": best.values, "topk_tokens": best.indices}
            else:
                _compare_draws(comparison, case, name, tree, shape)
            for key, actual in found.items():
                comparison.compare(f"outputs/{name}/{key}", actual, case.outputs[f"{name}/{key}"])
    return comparison


def _compare_draws(
    comparison: Comparison, case: GoldenCase, name: str, tree: DraftTree, shape: TreeShape
) -> None:
    """Distributions of expanded nodes, and probabilities of the draws given the earlier ones.

    The latter are quotients by the probability that was left. That can be 1e-6, of which rounding leaves one digit, so
    both sides are multiplied by it.
    """
    assert tree.draft_probs is not None
    inner = _inner(shape)
    for depth, nodes in enumerate(inner[: shape.depth]):
        key = f"{name}/draft_distribution_level_{depth}"
        comparison.compare(f"outputs/{key}", tree.draft_probs[0, nodes], case.outputs[key])
    expanded = [node for level in inner for node in level]
    probs = tree.draft_probs[0, expanded].gather(1, case.inputs[f"{name}/sampled_tokens"])
    left = (1 - (probs.cumsum(1) - probs)).clamp_min(0)
    quotients = (probs / left).nan_to_num(0, 0, 0).clamp(0, 1)
    rows = leaf_rows(tree)
    found = {
        "sampled_conditional_prob": (quotients, left),
        "candidate_prob": tuple(
            _along(rows, _of_children(shape, expanded, part), 1.0) for part in (quotients, left)
        ),
    }
    for key, (actual, weight) in found.items():
        expected = case.outputs[f"{name}/{key}"]
        comparison.compare(f"outputs/{name}/{key}", actual * weight, expected * weight)


def _of_children(shape: TreeShape, expanded: Sequence[int], table: Tensor) -> Tensor:
    """Entry c of the row of a node `[expanded, 10]` is its child c's, `[t]`; the root gets 1."""
    of_node = torch.ones(shape.num_nodes)
    for node, row in zip(expanded, table, strict=True):
        children = shape.children(node)
        of_node[children.start : children.stop] = row[: len(children)]
    return of_node


def _inner(shape: TreeShape) -> list[list[int]]:
    """The nodes of every level that have children."""
    return [[node for node in level if shape.num_children[node]] for level in shape.levels]


def _along(rows: Tensor, values: Tensor, padding: float) -> Tensor:
    return values[rows.clamp_min(0)].masked_fill(rows < 0, padding)


@dataclass(frozen=True)
class Replay:
    """Recorded tokens take the place of draws, `[expanded nodes, 10]`."""

    shape: TreeShape
    draws: Tensor

    @property
    def max_nodes(self) -> int:
        return self.shape.num_nodes - 1

    def grow(self, roots: Tensor, root_probs: Tensor, expand: Expand, streams: UniformSource) -> DraftTree:
        left = iter(self.draws)

        def choose(probs: Tensor, children: Sequence[range]) -> tuple[Tensor, Tensor]:
            tokens = torch.stack([next(left) for _ in children])[None]
            return tokens, torch.ones_like(tokens, dtype=torch.bool)

        return grow_static(roots, root_probs, self.shape, expand, choose)


@dataclass(frozen=True)
class RecordingStart(DraftStart):
    """Keeps the guided logits of every level."""

    seen: list[Tensor] = field(default_factory=list)

    def guide(self, logits: Tensor, positions: Tensor) -> Tensor:
        self.seen.append(super().guide(logits, positions))
        return self.seen[-1]

    def take(self) -> list[Tensor]:
        """Those since the last call."""
        seen = [*self.seen]
        self.seen.clear()
        return seen


class Head(NextTokenGenerator):
    """As much of a target as a drafter asks for."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def features_to_logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


def _rounds(
    case: GoldenCase, growers: Sequence[TreeDrafting], sampling: SamplingParams
) -> tuple[RecordingStart, Iterator[DraftTree]]:
    """The trees of two rounds; the recorded prefix ends some tokens after the condition."""
    features, ids = case.inputs["hidden_states"], case.inputs["input_ids2"][0]
    nothing = torch.zeros(len(features), 0)
    start = RecordingStart(
        target=Head(case.inputs["head_weight"]),
        condition=nothing,
        reading=Reading(features[:, :CONDITION_LENGTH], nothing),
        guidance_scales=torch.full((256,), case.meta["cfg_scale"]),
        sampling=sampling,
        is_guided=True,
        batch_size=1,
    )
    session = EagleSession(load(case), growers[0], start)
    blocks = (features[:, CONDITION_LENGTH:], case.inputs["hidden_states2"])

    def rounds() -> Iterator[DraftTree]:
        streams, position = ImageStreams.from_seeds([0]), CONDITION_LENGTH
        assert not ids[:position].any()  # what stands in for the tokens of the condition
        session.propose(ids[[position]], torch.tensor([0]), streams)
        start.take()
        for grower, block in zip(growers, blocks, strict=True):
            session.drafting = grower
            session.commit(_committed(block, ids[position : position + block.shape[1] + 1]))
            position += block.shape[1]
            yield session.propose(ids[[position]], torch.tensor([position - CONDITION_LENGTH]), streams)

    return start, rounds()


def _committed(features: Tensor, tokens: Tensor) -> Outcome:
    """All of a chain was accepted: features `[r m d]` of the first m of its tokens `[m+1]`."""
    count = features.shape[1]
    path = torch.arange(count)[None]
    tree = DraftTree(tokens[None, :-1], path - 1, torch.ones_like(path, dtype=torch.bool))
    nothing = torch.zeros(1, count, 0)
    return Outcome(
        tree, Reading(features, nothing), nothing, nothing, path, torch.tensor([count]), tokens[-1:]
    )


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    if settings["temperature"] == 0:
        return SamplingParams(top_k=1)
    return SamplingParams(settings["temperature"], settings["filter_top_k"] or None, settings["filter_top_p"])


def _warped(logits: Tensor, sampling: SamplingParams) -> Tensor:
    is_possible = token_probabilities(logits, sampling) > 0
    return (logits / sampling.temperature).masked_fill(~is_possible, float("-inf"))


CHECKS: dict[str, Check] = {
    "static_trees": check_static_trees,
    "dynamic_tree": check_dynamic_tree,
    "static_draft": check_static_draft,
}
