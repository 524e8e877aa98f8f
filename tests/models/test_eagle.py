"""The EAGLE network: caches, trees, positions, saving. What it computes is compared with the release by the goldens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vistok
from tests.golden_checks.case import GoldenCase
from tests.golden_checks.lantern_eagle import CHECKS
from vistok.kernels.attention import CausalMask, TreeMask
from vistok.models.drafters.eagle import POSITIONS, EagleDrafter

GOLDENS = Path(__file__).parents[1] / "goldens" / "lantern"
TINY = {
    "codebook_size": 11,
    "num_tokens": 9,
    "prefix_length": 2,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 24,
}
LENGTH = 11  # condition and image


def make(**changes) -> EagleDrafter:
    torch.manual_seed(0)
    network = EagleDrafter(**{**TINY, **changes}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def inputs(count: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, count, 16, generator=generator),
        torch.randn(rows, count, 16, generator=generator),
    )


@pytest.mark.parametrize("name", ["drafter_forward_t2i", "drafter_forward_c2i", "drafter_train_loss"])
def test_recorded_results_are_reproduced(name: str) -> None:
    case = GoldenCase.read(GOLDENS / name)
    comparison = CHECKS[case.kind](case)
    assert comparison.failures == []
    assert set(case.expected) <= comparison.names


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_a_cache_changes_nothing(positions: str) -> None:
    network = make(positions=positions)
    features, embeds = inputs(LENGTH)
    places = torch.arange(LENGTH)
    whole = network(features, embeds, places, CausalMask())
    cache = network.new_cache(2)
    parts = [
        network(features[:, part], embeds[:, part], places[part], CausalMask(), cache)
        for part in (slice(0, 4), slice(4, 5), slice(5, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_a_branch_of_a_tree_is_a_sequence(positions: str) -> None:
    """Rows of different lengths; nodes 0 and 1 are siblings, 2 is below 1: along 1, 2 the tree is a causal sequence."""
    network = make(positions=positions)
    features, embeds = inputs(LENGTH)
    lengths = torch.tensor([4, 6])
    cache = network.new_cache(2)
    cache.split_rows()
    steps = torch.arange(6)
    earlier = (steps <= steps[:, None]).expand(2, -1, -1)
    network(features[:, :6], embeds[:, :6], steps.expand(2, -1), TreeMask(cache.lengths, earlier), cache)
    cache.commit(steps.expand(2, -1), lengths)
    ancestors = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool).expand(2, -1, -1)
    places = lengths[:, None] + torch.tensor([0, 0, 1])
    nodes = network(features[:, 6:9], embeds[:, 6:9], places, TreeMask(lengths, ancestors), cache)
    for row, length in enumerate(lengths.tolist()):
        chosen = torch.tensor([*range(length), 7, 8])
        sequence = network(
            features[[row]][:, chosen], embeds[[row]][:, chosen], torch.arange(length + 2), CausalMask()
        )
        torch.testing.assert_close(nodes[row, 1:], sequence[0, -2:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_condition_and_what_lies_beyond_the_image_have_no_place_on_the_grid() -> None:
    cos, sin = make().rotation(torch.arange(LENGTH + 3))
    vanished = (cos == 0).all(dim=1) & (sin == 0).all(dim=1)
    assert vanished.nonzero()[:, 0].tolist() == [0, 1, LENGTH, LENGTH + 1, LENGTH + 2]
    assert torch.equal(cos[2], torch.ones(4))  # the first image token: row 0, column 0


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_a_draft_can_run_over_the_end(positions: str) -> None:
    network = make(positions=positions)
    features, embeds = inputs(3)
    predicted = network(features, embeds, LENGTH - 1 + torch.arange(3), CausalMask())
    assert predicted.isfinite().all()


def test_the_first_block_normalises_its_input_only_if_asked() -> None:
    names = {name for name, _ in make().named_parameters()}
    assert "blocks.0.norm1.weight" not in names and "blocks.1.norm1.weight" in names
    assert "blocks.0.norm1.weight" in dict(make(input_norm=True).named_parameters())


def test_the_token_table_is_frozen_or_not_there() -> None:
    own = EagleDrafter(**TINY)
    assert not own.token_embed.weight.requires_grad and own.fuse.weight.requires_grad
    assert own.embed_tokens(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 16)
    borrowing = make(own_tokens=False)
    assert not any("token_embed" in name for name in borrowing.state_dict())
    with pytest.raises(ValueError, match="no token table of its own"):
        borrowing.embed_tokens(torch.zeros(1, 1, dtype=torch.int64))


@torch.inference_mode()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    network = make(positions="table", own_tokens=False)
    network.save_pretrained(tmp_path / "drafter")
    loaded = vistok.load(tmp_path / "drafter")
    assert isinstance(loaded, EagleDrafter)
    features, embeds = inputs(5)
    places = torch.arange(5)
    assert torch.equal(
        loaded(features, embeds, places, CausalMask()), network(features, embeds, places, CausalMask())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rows"}, "unknown positions 'rows'; choose one of grid, line, table"),
        ({"num_tokens": 10}, "num_tokens 10 does not make a square grid"),
        ({"prefix_length": -1}, "prefix_length must be at least 0, got -1"),
        ({"num_heads": 3}, "dim 16 is not a multiple of num_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EagleDrafter(**{**TINY, **changes})
