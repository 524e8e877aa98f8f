import pytest
import torch

from vistok.decoding.sampling import SamplingParams, sample, token_probabilities
from vistok.decoding.streams import ImageStreams

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf"), 0.5])


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(top_k=3), SamplingParams(top_p=0.8)],
)
def test_samples_follow_the_filtered_distribution(params):
    """Chi-square against the filtered probabilities; 20.5 is the 0.999 quantile at 5 degrees of freedom."""
    num = 20_000
    uniforms = torch.rand(num, generator=torch.Generator().manual_seed(0))
    drawn = sample(LOGITS.expand(num, -1), params, uniforms)
    probs = token_probabilities(LOGITS, params)
    counts = torch.bincount(drawn, minlength=len(LOGITS)).double()
    assert counts[probs == 0].sum() == 0
    expected = (probs * num).double()[probs > 0]
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < 20.5


def test_top_k_one_is_greedy():
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(1))
    drawn = sample(logits, SamplingParams(top_k=1), torch.rand(50))
    assert torch.equal(drawn, logits.argmax(dim=1))


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_extreme_draws_never_pick_an_impossible_id(edge):
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    assert sample(logits, SamplingParams(), torch.tensor([edge])).item() in (1, 2)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    probs = token_probabilities(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), SamplingParams(top_p=0.75))
    torch.testing.assert_close(probs, torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_typical_keeps_the_ids_whose_surprise_is_nearest_the_entropy():
    """With one dominant id of low surprise and many alike, the typical ones are those nearest the entropy."""
    probs = torch.tensor([0.4] + [0.06] * 10)
    surprise = -probs.log()
    entropy = (probs * surprise).sum()
    nearest = int((surprise - entropy).abs().argmin())
    kept = token_probabilities(probs.log(), SamplingParams(typical_p=0.01))
    assert kept[nearest] == 1.0 and (kept > 0).sum() == 1


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SamplingParams(**arguments)


def test_a_stream_does_not_depend_on_its_neighbours():
    alone = ImageStreams.from_seeds([7])
    together = ImageStreams.from_seeds([1, 7, 3])
    for _ in range(3):
        assert torch.equal(alone.uniform(4)[0], together.uniform(4)[1])
