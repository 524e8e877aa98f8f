"""Goldens of LANTERN: the neighbour table, and the verification of whole trees by every rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.accept import AcceptRule, Proposals
from vistok.decoding.speculative.lantern import LanternGreedyRule, LanternRule
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import GreedyRule, StrictRule

Tensors = dict[str, Tensor]
Walk = tuple[list[int], Tensor, int]  # accepted nodes, leftover [v], number of uniforms that counted


def check_neighbours(case: GoldenCase) -> Comparison:
    """Full tables; where two codes are equally far but for rounding, either order will do."""
    comparison = Comparison()
    for name in case.config:
        codes, expected = case.inputs[f"{name}/codebook"], case.outputs[f"{name}/neighbor_table"]
        table = NeighbourTable.build(codes, len(codes) - 1).indices.long()
        distances = torch.cdist(codes.double(), codes.double())
        gaps = (distances.gather(1, table) - distances.gather(1, expected)).abs()
        settled = torch.where(gaps < 1e-6, expected, table)
        comparison.compare(f"outputs/{name}/neighbor_table", settled, expected)
    return comparison


def check_sampling(case: GoldenCase) -> Comparison:
    """Deterministic and drawn proposals: the released rule throughout, and ours where both should agree."""
    comparison = Comparison()
    table = NeighbourTable(case.inputs["neighbor_table"].int())
    for name, settings in case.meta["cases"].items():
        inputs, expected = _of_case(case.inputs, name), _of_case(case.outputs, name)
        target = _warped(inputs["node_logits"], settings)
        drafts = _drafts(inputs, case.inputs)
        k = settings["lantern_k"] if settings["lantern"] else 0
        released = LanternRule(table, k, settings["lantern_delta"], mode="official")
        _compare(comparison, name, _walk(released, inputs, target, drafts), inputs, expected)
        if k == 0 and inputs["uniforms"].min() > 0:
            walk = _walk(StrictRule(), inputs, target, drafts)
            _compare(comparison, name, walk, inputs, expected, prefix="strict")
    return comparison


def check_greedy(case: GoldenCase) -> Comparison:
    """The longest path of children that qualify, and the most probable token after it."""
    comparison = Comparison()
    table = NeighbourTable(case.inputs["neighbor_table"].int())
    for name, settings in case.meta["cases"].items():
        inputs, expected = _of_case(case.inputs, name), _of_case(case.outputs, name)
        target = inputs["node_logits"].softmax(dim=1)
        if settings["lantern"]:
            rule = LanternGreedyRule(table, settings["lantern_k"], settings["lantern_delta"])
            path = _longest_path(rule, inputs, target)
        else:
            inputs["uniforms"] = torch.zeros(len(target))
            path = _walk(GreedyRule(), inputs, target, {})[0]
        logits = inputs["node_logits"][path[-1] if path else 0]
        found = _path(path, inputs) | {"next_logits": logits, "next_token": logits.argmax()}
        for key, tensor in expected.items():
            comparison.compare(f"outputs/{name}/{key}", found[key], tensor)
    return comparison


def _of_case(tensors: Tensors, name: str) -> Tensors:
    """Those of one case, together with what all cases share."""
    shared = {key: tensor for key, tensor in tensors.items() if "/" not in key}
    prefix = f"{name}/"
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return shared | own


def _warped(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """In the released order: temperature, top-p, top-k."""
    first = SamplingParams(temperature=settings["temperature"], top_p=settings["top_p"])
    return token_probabilities(
        token_probabilities(logits, first).log(), SamplingParams(top_k=settings["top_k"] or None)
    )


def _drafts(inputs: Tensors, shared: Tensors) -> Tensors:
    """What the children of every node were drawn from, by node; without what the golden says cannot be drawn."""
    drafts: Tensors = {}
    if "parent_row_index" not in shared:
        return drafts
    retrieve, rows = inputs["retrieve_indices"], shared["parent_row_index"]
    for row, column in (retrieve[:, 1:] >= 0).nonzero().tolist():
        node = int(retrieve[row, column])
        drawn = inputs[f"draft_distribution_level_{column}"][rows[row, column + 1]]
        draft = drafts.setdefault(str(node), drawn.clone())
        if inputs["candidate_prob"][row, column + 1] == 0:
            draft[inputs["candidates"][row, column + 1]] = 0
    return drafts


def _walk(rule: AcceptRule, inputs: Tensors, target: Tensor, drafts: Tensors) -> Walk:
    """From the root down, one row."""
    path: list[int] = []
    node, used = 0, 0
    while True:
        children = (inputs["node_parents"] == node).nonzero()[:, 0]
        tokens = inputs["node_tokens"][children][None]
        draft = drafts.get(str(node))
        proposals = Proposals(
            tokens, torch.ones_like(tokens, dtype=torch.bool), None if draft is None else draft[None]
        )
        decision = rule.decide(target[node][None], proposals, inputs["uniforms"][used:][None])
        used += int(decision.num_tried)
        if int(decision.child) < 0:
            return path, decision.leftover[0], used
        node = int(children[decision.child])
        path.append(node)


def _longest_path(rule: LanternGreedyRule, inputs: Tensors, target: Tensor) -> list[int]:
    """Of the first row that has the longest."""
    parents = inputs["node_parents"]
    verdicts = rule.qualify(target[parents.clamp_min(0)], inputs["node_tokens"][:, None])[:, 0]
    paths = []
    for row in inputs["retrieve_indices"].tolist():
        nodes = [node for node in row[1:] if node >= 0]
        length = next((i for i, node in enumerate(nodes) if not verdicts[node]), len(nodes))
        paths.append(nodes[:length])
    return max(paths, key=len)


def _path(path: list[int], inputs: Tensors) -> Tensors:
    """In the words of the golden."""
    rows = inputs["retrieve_indices"][:, 1 : len(path) + 1].tolist()
    return {
        "accept_length": torch.tensor(len(path)),
        "accepted_tokens": inputs["node_tokens"][path],
        "best_candidate": torch.tensor(rows.index(path)),
    }


def _compare(
    comparison: Comparison, name: str, walk: Walk, inputs: Tensors, expected: Tensors, prefix: str = "outputs"
) -> None:
    path, leftover, used = walk
    found = _path(path, inputs) | {"next_distribution": leftover, "uniforms_used": torch.tensor(used)}
    for key, tensor in expected.items():
        comparison.compare(f"{prefix}/{name}/{key}", found[key], tensor, atol=1e-5)


CHECKS: dict[str, Check] = {
    "neighbor_table": check_neighbours,
    "accept_dynamic_sampling": check_sampling,
    "accept_static_sampling": check_sampling,
    "accept_greedy": check_greedy,
}
