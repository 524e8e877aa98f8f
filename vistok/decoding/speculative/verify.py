"""From a draft tree and what the target says at its nodes to the tokens that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import AcceptRule, Proposals
from vistok.decoding.speculative.lantern import LanternGreedyRule
from vistok.decoding.speculative.tree import DraftTree


@dataclass(frozen=True)
class Verified:
    """Which nodes of a tree are kept.

    Args:
        path: `[b d]` int64 node ids from the root down, filled up with -1; d is 1 + the tree's greatest depth.
        num_accepted: `[b]` int64, nodes of the path below the root.
        extra: `[b v]`, what the token after the path is drawn from.
    """

    path: Tensor
    num_accepted: Tensor
    extra: Tensor


def verify(tree: DraftTree, target: Tensor, rule: AcceptRule, uniforms: Tensor) -> Verified:
    """Walk down from the root while the rule accepts a child.

    Args:
        tree: of the proposals.
        target: `[b t v]` float32, distributions of the token after each node.
        rule: judges the children of one node after the other. A `LanternGreedyRule` draws nothing: its longest path is
            taken, as released.
        uniforms: `[b m]` in [0, 1); number j of a row is for the j-th child that is tried in it.

    Raises:
        ValueError: target or uniforms do not fit the tree.
    """
    if target.ndim != 3 or target.shape[:2] != tree.tokens.shape:
        raise ValueError(
            f"target must be [b t v] for nodes {list(tree.tokens.shape)}, got {list(target.shape)}"
        )
    most = tree.tokens.shape[1] - 1
    if uniforms.ndim != 2 or len(uniforms) != len(target) or uniforms.shape[1] < most:
        raise ValueError(
            f"a tree of {most} proposals needs as many uniforms per row, got {list(uniforms.shape)}"
        )
    if isinstance(rule, LanternGreedyRule):
        return _longest_path(tree, target, rule)
    return _walk(tree, target, rule, uniforms.to(target.device))


def _walk(tree: DraftTree, target: Tensor, rule: AcceptRule, uniforms: Tensor) -> Verified:
    rows = torch.arange(len(target), device=target.device)
    node = torch.zeros_like(rows)
    is_walking = torch.ones_like(rows, dtype=torch.bool)
    max_depth = tree.limits.max_depth
    num_used = torch.zeros_like(rows)
    path, extra = [node], target.new_zeros(target[:, 0].shape)
    for depth in range(max_depth + 1):
        at = node.clamp_min(0)
        children, exists = tree.children(node)  # [b k] each
        if depth == max_depth:  # there are none
            children, exists = children[:, :0], exists[:, :0]
        draft = None if tree.draft_probs is None else tree.draft_probs[rows, at]
        proposals = Proposals(tree.tokens.gather(1, children), exists, draft)
        ranks = num_used[:, None] + torch.arange(children.shape[1], device=target.device)
        decision = rule.decide(target[rows, at], proposals, _pick(uniforms, ranks))
        is_accepted = is_walking & (decision.child >= 0)
        extra = torch.where((is_walking & ~is_accepted)[:, None], decision.leftover, extra)
        num_used = num_used + decision.num_tried
        is_walking = is_accepted
        if depth == max_depth:
            break
        chosen = children.gather(1, decision.child.clamp_min(0)[:, None])[:, 0]
        node = chosen.masked_fill(~is_walking, -1)
        path.append(node)
    nodes = torch.stack(path, dim=1)  # [b d]
    return Verified(nodes, (nodes >= 0).sum(dim=1) - 1, extra)


def _pick(uniforms: Tensor, ranks: Tensor) -> Tensor:
    """`uniforms [b m]` at `ranks [b k]`; ranks beyond the last belong to children that do not exist."""
    if not ranks.shape[1]:
        return uniforms[:, :0]
    return uniforms.gather(1, ranks.clamp_max(uniforms.shape[1] - 1))


def _longest_path(tree: DraftTree, target: Tensor, rule: LanternGreedyRule) -> Verified:
    """To the deepest of the nodes that qualify together with all nodes above them."""
    most = tree.tokens.shape[1]
    qualifies = torch.ones_like(tree.exists)
    for i in range(1, most):
        before = target.gather(1, tree.parents[:, i, None, None].expand(-1, 1, target.shape[2]))[:, 0]
        qualifies[:, i] = rule.qualify(before, tree.tokens[:, i : i + 1])[:, 0]
    qualifies &= tree.exists
    is_reached = (qualifies[:, None] | ~tree.ancestors).all(dim=2)  # [b t]
    depth = tree.depths.masked_fill(~is_reached, -1)
    is_deepest = depth == depth.amax(dim=1, keepdim=True)
    places = torch.arange(most, device=target.device) if rule.ties == "node" else _first_leaves(tree)
    last = torch.where(is_deepest, places, most).argmin(dim=1)  # [b]
    rows = torch.arange(len(last), device=last.device)
    is_on_path = tree.ancestors[rows, last]  # [b t]
    num_nodes = is_on_path.sum(dim=1)
    nodes = (~is_on_path).long().argsort(dim=1, stable=True)[:, : tree.limits.max_depth + 1]
    path = nodes.masked_fill(~is_on_path.gather(1, nodes), -1)
    best = target[rows, last].argmax(dim=1, keepdim=True)
    extra = torch.zeros_like(target[:, 0]).scatter(1, best, 1.0)
    return Verified(path, num_nodes - 1, extra)


def _first_leaves(tree: DraftTree) -> Tensor:
    """`[b t]`: the lowest id of the leaves at or below each node."""
    most = tree.tokens.shape[1]
    num_children = torch.zeros_like(tree.parents).scatter_add(
        1, tree.parents[:, 1:], tree.exists[:, 1:].long()
    )
    is_leaf = tree.exists & (num_children == 0)
    node_ids = torch.arange(most, device=tree.tokens.device)
    is_below = tree.ancestors & is_leaf[:, :, None]  # [b leaf node]
    return torch.where(is_below, node_ids[:, None], most).amin(dim=1)
