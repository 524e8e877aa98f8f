from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.decoding.speculative.laws import BatchStream
from vistok.decoding.speculative.draft_length import (
    AcceptanceRate,
    AdaptiveLength,
    ChainDrafting,
    ConfidenceThreshold,
    FixedLength,
)
from vistok.decoding.speculative.tree_drafting import Level
from vistok.decoding.streams import ImageStreams


def test_the_rate_starts_undecided_and_follows_what_was_tried() -> None:
    rate = AcceptanceRate.unknown(3, torch.device("cpu"))
    assert rate.rate.tolist() == [0.5, 0.5, 0.5]
    once = rate.after(torch.tensor([4, 4, 2]), torch.tensor([4, 1, 0]))
    # All four accepted; one of the two that were tried; none of one.
    torch.testing.assert_close(once.rate, torch.tensor([4.5 / 5, 1.5 / 3, 0.5 / 2]))
    twice = once.after(torch.tensor([1, 1, 1]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(twice.accepted, torch.tensor([0.9 * 4, 0.9 + 1, 1.0]))
    torch.testing.assert_close(twice.tried, torch.tensor([0.9 * 4 + 1, 0.9 * 2 + 1, 0.9 + 1]))


def test_a_draft_goes_on_while_the_drafter_is_sure() -> None:
    law = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3]])
    assert ConfidenceThreshold(8, 0.45).goes_on(1, law, torch.ones(2)).tolist() == [True, False]
    assert ConfidenceThreshold(8, 0.0).goes_on(7, law, torch.zeros(2)).all()


def test_a_draft_ends_when_a_rejection_is_too_likely() -> None:
    rate = torch.tensor([0.9, 0.6, 0.0])
    law = torch.full((3, 2), 0.5)
    goes_on = torch.stack([AdaptiveLength(8, 0.5).goes_on(count, law, rate) for count in range(1, 8)])
    # 0.9 ** 6 = 0.53 and 0.6 ** 1 are above one half, one power more is not.
    assert goes_on.sum(dim=0).tolist() == [6, 1, 0]


def uniform_expand(level: Level) -> Tensor:
    """A drafter of 5 codes that knows nothing."""
    return torch.full((*level.tokens.shape, 5), 0.2)


def laws_by_root(roots: Tensor) -> Tensor:
    """Sure of itself where the root is 0."""
    sure = torch.tensor([0.96, 0.01, 0.01, 0.01, 0.01])
    return torch.where((roots == 0)[:, None], sure, torch.full((5,), 0.2))


def test_rows_stop_at_lengths_of_their_own() -> None:
    roots = torch.tensor([0, 3])
    drafting = ChainDrafting(ConfidenceThreshold(4, 0.5), torch.full((2,), 0.5))
    tree = drafting.grow(roots, laws_by_root(roots), uniform_expand, BatchStream(2, 0))
    assert tree.exists.tolist() == [[True, True, True], [True, True, False]]  # one more after a sure token
    assert tree.depths.tolist() == [[0, 1, 2]] * 2
    assert tree.draft_probs is not None
    torch.testing.assert_close(tree.draft_probs[:, 0], laws_by_root(roots))
    torch.testing.assert_close(tree.draft_probs[:, 1], torch.full((2, 5), 0.2))


@pytest.mark.parametrize("length", [FixedLength(3), ConfidenceThreshold(3, 0.5), AdaptiveLength(3, 0.6)])
def test_a_chain_does_not_depend_on_its_neighbours(length) -> None:
    roots, rate = torch.tensor([0, 3, 0]), torch.tensor([0.3, 0.9, 0.5])
    together = ChainDrafting(length, rate).grow(
        roots, laws_by_root(roots), uniform_expand, ImageStreams.from_seeds([5, 6, 7])
    )
    for row in range(3):
        one, stream = roots[row : row + 1], ImageStreams.from_seeds([5 + row])
        alone = ChainDrafting(length, rate[row : row + 1]).grow(
            one, laws_by_root(one), uniform_expand, stream
        )
        count = int(alone.exists.sum())
        assert torch.equal(together.tokens[row, :count], alone.tokens[0, :count])
        assert int(together.exists[row].sum()) == count
        used = ImageStreams.from_seeds([5 + row])
        used.uniform(3)
        assert torch.equal(stream.uniform(), used.uniform())  # as many numbers whatever was drafted


def test_tokens_are_drawn_from_the_laws_that_are_told() -> None:
    roots = torch.zeros(20_000, dtype=torch.int64)
    law = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
    drafting = ChainDrafting(FixedLength(1), torch.ones(len(roots)))
    tree = drafting.grow(roots, law.expand(len(roots), -1), uniform_expand, BatchStream(len(roots), 1))
    shares = tree.tokens[:, 1].bincount(minlength=5) / len(roots)
    torch.testing.assert_close(shares, law, atol=0.012, rtol=0)


def test_a_greedy_target_gets_the_most_probable_tokens() -> None:
    roots = torch.tensor([0])
    law = torch.tensor([[0.1, 0.2, 0.4, 0.3, 0.0]])

    def expand(level: Level) -> Tensor:
        return law[:, None].roll(1, dims=2)

    tree = ChainDrafting(FixedLength(2), torch.ones(1), takes_best=True).grow(
        roots, law, expand, BatchStream(1, 0)
    )
    assert tree.tokens.tolist() == [[0, 2, 3]] and tree.draft_probs is None


@pytest.mark.parametrize("policy", [FixedLength, ConfidenceThreshold, AdaptiveLength])
def test_lengths_below_one_are_refused(policy) -> None:
    with pytest.raises(ValueError, match="at least 1 token, got longest 0"):
        policy(longest=0)


@pytest.mark.parametrize("policy", [ConfidenceThreshold, AdaptiveLength])
@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_outside_0_and_1_are_refused(policy, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        policy(threshold=threshold)
