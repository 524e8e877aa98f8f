"""With the strict rule, every drafter leaves the law of all tokens of an image as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.decoding.speculative.laws import (
    NUM_CODES,
    BatchStream,
    exact_law,
    p_value,
    tiny_target,
)
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.draft_length import AdaptiveLength, ConfidenceThreshold, FixedLength
from vistok.decoding.speculative.drafters.early_exit import EarlyExitDrafter
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.drafters.neighbours import NeighbourDrafter
from vistok.decoding.speculative.drafters.recycling import RecyclingDrafter
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.tree import TreeShape
from vistok.decoding.streams import ImageStreams
from vistok.models.drafters.early_exit import EarlyExitAdapter

NUM_IMAGES, LABEL = 4000, 1
TREE = TreeShape.from_counts([[2], [2, 1], [1, 0, 1]])


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def make_adapter(target) -> EarlyExitAdapter:
    torch.manual_seed(7)
    adapter = EarlyExitAdapter.for_target(target, 1)
    torch.nn.init.normal_(adapter.attn.proj.weight, std=0.3)
    return adapter.eval()


def make_drafter(name: str, target):
    """Drafters that are neither perfect nor hopeless."""
    if name.startswith("independent"):
        tree = {"fixed": FixedLength(3), "adaptive": AdaptiveLength(3, 0.5), "tree": TREE}[name.split("-")[1]]
        return IndependentDrafter(tiny_target(seed=3, depth=1), tree)
    if name.startswith("early-exit"):
        tree = TREE if name.endswith("tree") else ConfidenceThreshold(3, 0.5)
        return EarlyExitDrafter(make_adapter(target), tree)
    return {
        "recycling": RecyclingDrafter(TREE, num_successors=2),
        "neighbours": NeighbourDrafter(TREE),
        "jacobi": JacobiDrafter(3),
        "jacobi-fresh": JacobiDrafter(2, coupled=False),
        "jacobi-uniform": JacobiDrafter(3, opening="uniform"),
    }[name]


DRAFTERS = [
    "independent-fixed",
    "independent-adaptive",
    "independent-tree",
    "early-exit-chain",
    "early-exit-tree",
    "recycling",
    "neighbours",
    "jacobi",
    "jacobi-fresh",
    "jacobi-uniform",
]
SETTINGS = {
    "plain": (SamplingParams(), 1.0),
    "guided": (SamplingParams(top_k=3, temperature=1.2), 1.8),
}


def draw_many(target, drafter, sampling: SamplingParams, scale: float, seed: int = 0):
    labels = torch.full((NUM_IMAGES,), LABEL)
    return generate_speculative(
        target,
        labels,
        drafter=drafter,
        streams=BatchStream(NUM_IMAGES, seed),
        sampling=sampling,
        guidance=ConstantGuidance(scale),
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_images_follow_the_law_of_the_target(target, name: str, setting: str) -> None:
    sampling, scale = SETTINGS[setting]
    result = draw_many(target, make_drafter(name, target), sampling, scale)
    assert p_value(result.tokens.data, exact_law(target, LABEL, sampling, scale)) > 1e-3
    passes = result.statistics.row_passes
    assert (
        passes.float().mean() < 3 and passes.max() > passes.min()
    )  # some drafts are accepted, and some are not


class Lying(JacobiDrafter):
    """Says that its tokens were drawn from something else than they were."""

    def begin(self, start):
        session = super().begin(start)
        propose = session.propose

        def lie(*arguments):
            tree = propose(*arguments)
            return replace(tree, draft_probs=(tree.draft_probs + 0.3) / (1 + 0.3 * NUM_CODES))

        session.propose = lie
        return session


def test_the_statistic_finds_a_drafter_with_a_wrong_law(target) -> None:
    sampling, scale = SETTINGS["plain"]
    result = draw_many(target, Lying(3), sampling, scale)
    assert p_value(result.tokens.data, exact_law(target, LABEL, sampling, scale)) < 1e-6


@pytest.mark.parametrize("name", DRAFTERS)
def test_an_image_depends_on_its_own_seed_alone(target, name: str) -> None:
    labels, seeds = torch.tensor([0, 2, 1, 1]), [11, 12, 13, 14]

    def draw(rows: slice):
        return generate_speculative(
            target,
            labels[rows],
            drafter=make_drafter(name, target),
            streams=ImageStreams.from_seeds(seeds[rows]),
            guidance=ConstantGuidance(1.5),
        )

    together = draw(slice(None))
    for row in range(4):
        alone = draw(slice(row, row + 1))
        assert torch.equal(alone.tokens.data[0], together.tokens.data[row])
        assert alone.statistics.row_passes[0] == together.statistics.row_passes[row]


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_decoding_gives_the_most_probable_tokens(target, name: str) -> None:
    labels = torch.tensor([0, 2, 1])
    result = generate_speculative(
        target,
        labels,
        drafter=make_drafter(name, target),
        streams=BatchStream(3, 0),
        sampling=SamplingParams(top_k=1),
    )
    images = result.tokens.data
    with torch.no_grad():
        assert torch.equal(images, target(labels, images).argmax(dim=2))
