"""Whether tokens follow a generator: exact for those that do, and certain about those that do not."""

from __future__ import annotations

import pytest
import torch

from tests.decoding.speculative.laws import BatchStream, tiny_target
from vistok.decoding.guidance import ConstantGuidance, apply_guidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.accept import Judgement, Proposals
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.lantern import LanternRule
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import StrictRule
from vistok.eval.token_laws import WatchedRule, places_in_laws, token_laws, uniformity, variation
from vistok.pipelines.settings import OrderedSettings

SETTINGS = OrderedSettings(guidance_scale=1.5, top_p=0.9)
NUM_IMAGES = 3000


class Generous(StrictRule):
    """Broken: accepts everything that the target can draw at all."""

    def judge(self, target, proposals) -> Judgement:
        judgement = super().judge(target, proposals)
        return Judgement(judgement.are_tried, (judgement.chances > 0).float(), judgement.leftover)


def speculate(model, rule, labels):
    return generate_speculative(
        model,
        labels,
        drafter=JacobiDrafter(2),
        rule=rule,
        streams=BatchStream(len(labels), seed=3),
        sampling=SETTINGS.sampling,
        guidance=ConstantGuidance(SETTINGS.guidance_scale),
    ).tokens.data


def p_value(model, labels, indices) -> float:
    laws = token_laws(model, labels, indices, SETTINGS)
    uniforms = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1))
    return uniformity(places_in_laws(laws, indices, uniforms))


def test_laws_are_those_that_tokens_are_drawn_from() -> None:
    model, labels = tiny_target(), torch.tensor([2, 0])
    indices = torch.tensor([[3, 1, 0, 2], [0, 0, 1, 3]])
    with torch.no_grad():
        cond, uncond = model(labels, indices), model(model.null_condition(2), indices)
    expected = token_probabilities(apply_guidance(cond, uncond, 1.5), SamplingParams(top_p=0.9))
    torch.testing.assert_close(token_laws(model, labels, indices, SETTINGS), expected)


def test_places_put_the_most_probable_first() -> None:
    laws = torch.tensor([0.1, 0.6, 0.2, 0.1, 0.0]).expand(5, 5)
    places = places_in_laws(laws, torch.arange(5), torch.full((5,), 0.5))
    # ids 0 and 3 are equally probable and share [0.8, 1]
    torch.testing.assert_close(places, torch.tensor([0.9, 0.3, 0.7, 0.9, 1.0]).double())


def test_plain_and_strict_tokens_follow_the_generator_and_broken_ones_do_not() -> None:
    model, labels = tiny_target(), torch.arange(NUM_IMAGES) % 3
    plain = generate_ordered(
        model,
        labels,
        streams=BatchStream(NUM_IMAGES, seed=2),
        sampling=SETTINGS.sampling,
        guidance=ConstantGuidance(1.5),
    )
    assert p_value(model, labels, plain.data) > 1e-3
    assert p_value(model, labels, speculate(model, StrictRule(), labels)) > 1e-3
    assert p_value(model, labels, speculate(model, Generous(), labels)) < 1e-6


def test_successive_places_must_be_independent() -> None:
    first = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    assert uniformity(torch.cat([first, first.roll(1, dims=0)], dim=1)) > 1e-3
    assert uniformity(torch.cat([first, 1 - first], dim=1)) < 1e-6  # each alone is uniform


@pytest.mark.parametrize("draft", [None, torch.tensor([[0.1, 0.4, 0.3, 0.2]])])
def test_the_variation_of_a_strict_rule_is_zero_and_that_of_lantern_is_not(draft) -> None:
    target = torch.tensor([0.4, 0.3, 0.2, 0.1])
    table = NeighbourTable.build(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 2)
    proposals = Proposals(torch.tensor([[3, 1]]), torch.tensor([[True, True]]), draft)
    assert variation(StrictRule(), target, proposals) == pytest.approx(0, abs=1e-6)
    assert variation(LanternRule(table, 2, 0.0), target, proposals) == pytest.approx(0, abs=1e-6)
    assert 0.05 < variation(LanternRule(table, 2, 0.9), target, proposals) < 1


def test_what_does_not_exist_is_not_proposed() -> None:
    target = torch.tensor([0.4, 0.3, 0.2, 0.1])
    rule = LanternRule(NeighbourTable.build(torch.arange(4.0)[:, None], 2), 2, 0.9)
    padded = Proposals(torch.tensor([[3, 1]]), torch.tensor([[True, False]]))
    alone = Proposals(torch.tensor([[3]]), torch.tensor([[True]]))
    assert variation(rule, target, padded) == variation(rule, target, alone) > 0


def test_a_watched_rule_decides_as_the_rule_does_and_remembers_nodes() -> None:
    model, labels = tiny_target(), torch.arange(8) % 3
    watched = WatchedRule(StrictRule())
    tokens = speculate(model, watched, labels)
    assert torch.equal(tokens, speculate(model, StrictRule(), labels))
    assert watched.is_lossless and watched.nodes
    for target, proposals in watched.nodes:
        assert target.shape == (4,) and proposals.exists.any() and proposals.draft.shape == (1, 4)
