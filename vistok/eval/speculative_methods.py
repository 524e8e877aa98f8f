"""Ways of speculative decoding by name: `NAME@TREE` for a drafter and the trees that it drafts, and rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vistok.decoding.speculative.accept import AcceptRule
from vistok.decoding.speculative.draft_length import AdaptiveLength, ConfidenceThreshold, DraftLength
from vistok.decoding.speculative.drafter import Drafter
from vistok.decoding.speculative.drafters.early_exit import EarlyExitDrafter
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.drafters.neighbours import NeighbourDrafter
from vistok.decoding.speculative.drafters.recycling import RecyclingDrafter
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.tree import NAMED_SHAPES, TreeShape
from vistok.hub import load_drafter
from vistok.models.generators.base import NextTokenGenerator
from vistok.models.identity import model_identity
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.speculation import make_rule

DEFAULT = "default"  # the drafter's own tree
DYNAMIC_BEAM, DYNAMIC_DEPTH = 8, 3
TREES_HELP = (
    "chain-N, adaptive-N or confident-N (chains of at most N), dynamic-N (N nodes), children per level such as 3x2x1, "
    f"{', '.join(name for name in NAMED_SHAPES if name != 'chain')}, or {DEFAULT}"
)
Tree = TreeShape | DynamicTreeParams | DraftLength
TITLES: dict[type, str] = {
    EagleTreeDrafter: "EAGLE",
    IndependentDrafter: "small generator",
    EarlyExitDrafter: "early exit",
    JacobiDrafter: "Jacobi",
    RecyclingDrafter: "recycling",
    NeighbourDrafter: "neighbour copies",
}
DEFAULT_TREES: dict[type, tuple[str, ...]] = {  # measured where none is named
    EagleTreeDrafter: ("chain-3", "chain-5", "2x2x1", "3x2x1x1", "dynamic-16"),
    IndependentDrafter: ("chain-3", "chain-5", "adaptive-8"),
    EarlyExitDrafter: ("chain-3", "confident-8"),
    JacobiDrafter: ("chain-4", "chain-8", "chain-16"),
    RecyclingDrafter: (DEFAULT,),
    NeighbourDrafter: (DEFAULT,),
}


@dataclass(frozen=True)
class NamedRule:
    """A rule and what tables call it."""

    name: str
    rule: AcceptRule


@dataclass(frozen=True)
class NamedDrafter:
    """A drafter and what tables call it.

    Args:
        name: its kind.
        tree: what it drafts.
        network: identity of its network; empty where it has none.
        num_parameters: of its network; 0 where it has none.
        drafter: the drafter itself.
    """

    name: str
    tree: str
    network: str
    num_parameters: int
    drafter: Drafter


def parse_tree(name: str) -> Tree:
    """A tree, or a policy of chains, by its name; see TREES_HELP.

    Raises:
        ValueError: no such tree.
    """
    kind, _, number = name.partition("-")
    kinds: dict[str, Any] = {
        "chain": TreeShape.chain,
        "adaptive": AdaptiveLength,
        "confident": ConfidenceThreshold,
        "dynamic": lambda nodes: DynamicTreeParams(DYNAMIC_BEAM, DYNAMIC_DEPTH, nodes),
    }
    if kind in kinds and number.isdecimal():
        tree: Tree = kinds[kind](int(number))
        return tree
    if name in NAMED_SHAPES:
        return NAMED_SHAPES[name]
    children = name.split("x")
    if not all(count.isdecimal() and int(count) for count in children):
        raise ValueError(f"unknown tree {name!r}; choose {TREES_HELP}")
    counts, width = [], 1
    for count in map(int, children):
        counts.append([count] * width)
        width *= count
    return TreeShape.from_counts(counts)


def with_tree(drafter: Any, name: str) -> Drafter:
    """The same drafter with another tree.

    Raises:
        ValueError: an unknown tree, or one that this drafter cannot draft.
    """
    if name == DEFAULT:
        return drafter
    tree = parse_tree(name)
    found = _static(drafter, tree) if isinstance(tree, TreeShape) else None
    if found is not None:
        return found
    if isinstance(drafter, EagleTreeDrafter) and isinstance(tree, TreeShape | DynamicTreeParams):
        return replace(drafter, tree=tree)
    if isinstance(drafter, IndependentDrafter | EarlyExitDrafter) and not isinstance(tree, DynamicTreeParams):
        return replace(drafter, tree=tree)
    raise ValueError(
        f"the drafter {TITLES.get(type(drafter), type(drafter).__name__)!r} cannot draft {name!r}"
    )


def _static(drafter: Any, tree: TreeShape) -> Drafter | None:
    """A drafter without a network, with another shape; `None` for others, and for a window that is no chain."""
    if isinstance(drafter, JacobiDrafter) and max(tree.num_children) == 1:
        return JacobiDrafter(tree.depth, coupled=drafter.coupled, opening=drafter.opening)
    if isinstance(drafter, RecyclingDrafter):
        return RecyclingDrafter(tree, num_successors=drafter.num_successors, successors=drafter.successors)
    if isinstance(drafter, NeighbourDrafter):
        return NeighbourDrafter(tree, drafter.neighbours)
    return None


def named_drafters(text: str, target: NextTokenGenerator) -> list[NamedDrafter]:
    """The drafters of `NAME@TREE`, or of `NAME` with all trees that are usual for it; see `load_drafter` for names.

    Raises:
        ValueError, FileNotFoundError: the name is unknown, or the tree is, or they do not go together.
    """
    name, _, tree = text.rpartition("@")
    if not name or "/" in tree:  # no tree, or the @ is in a folder's name
        name, tree = text, ""
    drafter: Any = load_drafter(name, target)
    network = next(
        (getattr(drafter, part) for part in ("network", "model", "adapter") if hasattr(drafter, part)), None
    )
    identity = "" if network is None else model_identity(network)
    num_parameters = 0 if network is None else sum(weight.numel() for weight in network.parameters())
    trees = (tree,) if tree else DEFAULT_TREES[type(drafter)]
    title = TITLES[type(drafter)]
    return [NamedDrafter(title, one, identity, num_parameters, with_tree(drafter, one)) for one in trees]


def default_names(target: NextTokenGenerator) -> list[str]:
    """The drafters without training that fit a generator."""
    has_grid = target.layout.grid is not None and len(target.layout.grid) == 2
    return ["jacobi", "recycling", *(["neighbours"] if has_grid else [])]


def named_rules(
    names: Sequence[str], tokenizer: ImageTokenizer, ks: Sequence[int], deltas: Sequence[float]
) -> list[NamedRule]:
    """Rules by the names of `make_rule`; LANTERN with every k and delta.

    Raises:
        ValueError: an unknown name, or numbers out of range.
    """
    rules = []
    for name in names:
        if name == "lantern":
            rules += [
                NamedRule(f"LANTERN k {k}, δ {delta:g}", make_rule(name, tokenizer, k=k, delta=delta))
                for k in ks
                for delta in deltas
            ]
        else:
            rules.append(NamedRule(name, make_rule(name, tokenizer)))
    return rules
