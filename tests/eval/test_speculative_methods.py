"""Drafters, trees and rules by name."""

from __future__ import annotations

import pytest
import torch

import vistok
from vistok.decoding.speculative.draft_length import AdaptiveLength, ConfidenceThreshold
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.drafters.neighbours import NeighbourDrafter
from vistok.decoding.speculative.drafters.recycling import RecyclingDrafter
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.tree import NAMED_SHAPES, TreeShape
from vistok.eval.speculative_methods import DEFAULT_TREES, named_drafters, named_rules, parse_tree, with_tree
from vistok.models.drafters.eagle import EagleDrafter

SIZES = {"codebook_size": 20, "num_tokens": 16, "dim": 16, "num_heads": 2, "mlp_dim": 16}


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    return vistok.LlamaGenClass(**SIZES, depth=2, num_classes=5)


@pytest.fixture(scope="module")
def small():
    return vistok.LlamaGenClass(**SIZES, depth=1, num_classes=5)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("chain-3", TreeShape.chain(3)),
        ("adaptive-6", AdaptiveLength(6)),
        ("confident-5", ConfidenceThreshold(5)),
        ("dynamic-12", DynamicTreeParams(8, 3, 12)),
        ("3x2x1", TreeShape.from_counts([[3], [2, 2, 2], [1] * 6])),
        ("mc_sim_7b_63", NAMED_SHAPES["mc_sim_7b_63"]),
    ],
)
def test_trees(name: str, tree) -> None:
    assert parse_tree(name) == tree


@pytest.mark.parametrize("name", ["bush", "chain-x", "3x0", "3x", "adaptive", ""])
def test_unknown_trees(name: str) -> None:
    with pytest.raises(ValueError, match="unknown tree"):
        parse_tree(name)


def test_a_drafter_keeps_all_but_its_tree(small) -> None:
    jacobi = with_tree(JacobiDrafter(3, coupled=False, opening="uniform"), "chain-7")
    assert (jacobi.window, jacobi.coupled, jacobi.opening) == (7, False, "uniform")
    recycling = with_tree(RecyclingDrafter(num_successors=6), "2x1")
    assert recycling.shape == parse_tree("2x1") and recycling.num_successors == 6
    neighbours = with_tree(NeighbourDrafter(neighbours=("above", "left", "above-left")), "3x1")
    assert neighbours.neighbours == ("above", "left", "above-left") and neighbours.shape.num_nodes == 7
    network = EagleDrafter(**SIZES, prefix_length=0)
    eagle = with_tree(EagleTreeDrafter(network), "dynamic-9")
    assert eagle.network is network and eagle.tree == DynamicTreeParams(8, 3, 9)
    independent = with_tree(IndependentDrafter(small), "adaptive-4")
    assert independent.model is small and independent.tree == AdaptiveLength(4)
    assert with_tree(eagle, "default") is eagle


def test_trees_that_a_drafter_cannot_draft(small) -> None:
    eagle = EagleTreeDrafter(EagleDrafter(**SIZES, prefix_length=0))
    wrong = [
        (JacobiDrafter(), "2x1"),
        (RecyclingDrafter(), "dynamic-9"),
        (NeighbourDrafter(), "adaptive-4"),
        (eagle, "adaptive-4"),
        (IndependentDrafter(small), "dynamic-9"),
    ]
    for drafter, tree in wrong:
        with pytest.raises(ValueError, match=f"cannot draft '{tree}'"):
            with_tree(drafter, tree)


def test_drafters_by_name(target, small, tmp_path) -> None:
    small.save_pretrained(tmp_path / "small")
    chosen = named_drafters(f"{tmp_path / 'small'}@chain-2", target)
    assert [(one.name, one.tree) for one in chosen] == [("small generator", "chain-2")]
    assert chosen[0].num_parameters == sum(weight.numel() for weight in small.parameters())
    assert chosen[0].network.startswith("LlamaGenClass-")
    small.save_pretrained(tmp_path / "a@b" / "small")
    assert len(named_drafters(str(tmp_path / "a@b" / "small"), target)) == len(
        DEFAULT_TREES[IndependentDrafter]
    )
    (jacobi,) = named_drafters("jacobi@chain-5", target)
    assert jacobi.drafter.window == 5 and (jacobi.network, jacobi.num_parameters) == ("", 0)
    assert tuple(one.tree for one in named_drafters("jacobi", target)) == DEFAULT_TREES[JacobiDrafter]


def test_every_default_tree_can_be_drafted(small) -> None:
    drafters = [
        JacobiDrafter(),
        RecyclingDrafter(),
        NeighbourDrafter(),
        IndependentDrafter(small),
        EagleTreeDrafter(EagleDrafter(**SIZES, prefix_length=0)),
    ]
    for drafter in drafters:
        for tree in DEFAULT_TREES[type(drafter)]:
            with_tree(drafter, tree)


def test_rules(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    tokenizer = vistok.ConvTiTok(
        image_size=16, num_tokens=6, levels=(5, 4), dim=16, num_heads=2, conv_dim=8, conv_depth=1
    )
    rules = named_rules(["strict", "lantern"], tokenizer, ks=[1, 5], deltas=[0.1, 2.0])
    assert [rule.name for rule in rules] == [
        "strict",
        "LANTERN k 1, δ 0.1",
        "LANTERN k 1, δ 2",
        "LANTERN k 5, δ 0.1",
        "LANTERN k 5, δ 2",
    ]
    assert [rule.rule.is_lossless for rule in rules] == [True, False, False, False, False]
    for names, ks, message in [(["greedy"], [], "unknown rule"), (["lantern"], [20], "k must be in 0..19")]:
        with pytest.raises(ValueError, match=message):
            named_rules(names, tokenizer, ks, [0.1])
