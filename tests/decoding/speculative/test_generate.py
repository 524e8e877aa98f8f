"""Speculative decoding of batches: the law of the tokens, and what neither the batch nor the end of an image changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.decoding.speculative.laws import BatchStream, p_value
from tests.decoding.speculative.markov import NUM_CODES, MarkovDrafter, MarkovSession, MarkovTarget
from vistok import FlexARClass, NARClass
from vistok.decoding.guidance import ConstantGuidance, LinearGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.drafter import check_same_vocabulary
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.strict import GreedyRule, StrictRule
from vistok.decoding.speculative.tree import DraftTree, TreeShape
from vistok.decoding.speculative.tree_drafting import DynamicDrafting, SampledDrafting, TopDrafting
from vistok.decoding.streams import ImageStreams

NUM_IMAGES = 20_000
CHAIN, TREE = TreeShape.chain(3), TreeShape.from_counts([[3], [2, 1], [1]])
DRAFTINGS = {
    "chain": SampledDrafting(CHAIN),
    "static tree": SampledDrafting(TREE),
    "deterministic tree": TopDrafting(TREE),
    "dynamic tree": DynamicDrafting(DynamicTreeParams(top_k=3, depth=2, total_tokens=9)),
    "small dynamic tree": DynamicDrafting(DynamicTreeParams(top_k=3, depth=3, total_tokens=4)),
}
SETTINGS = {
    "plain": (SamplingParams(), 1.0),
    "filtered": (SamplingParams(temperature=1.1, top_k=8, top_p=0.9), 1.0),
    "guided": (SamplingParams(), 1.7),
    "guided and filtered": (SamplingParams(top_k=6), 1.7),
}


def draw_pairs(rule: StrictRule, drafting: str, setting: str) -> tuple[list[float], Tensor]:
    """p-values of the joint laws of neighbouring tokens of many images, and the passes that each image took."""
    sampling, scale = SETTINGS[setting]
    target = MarkovTarget()
    result = generate_speculative(
        target,
        torch.zeros(NUM_IMAGES, dtype=torch.int64),
        drafter=MarkovDrafter(MarkovTarget(seed=5), DRAFTINGS[drafting]),
        rule=rule,
        streams=BatchStream(NUM_IMAGES, seed=3),
        sampling=sampling,
        guidance=ConstantGuidance(scale),
    )
    probs = target.probabilities(sampling, scale).double()
    marginal, values = probs[-1], []
    for first in range(3):
        law = (marginal[:, None] * probs[:-1]).flatten()
        values.append(p_value(result.tokens.data[:, first : first + 2], law, NUM_CODES))
        marginal = marginal @ probs[:-1]
    return values, result.statistics.row_passes


@pytest.mark.parametrize(
    ("drafting", "setting"),
    [
        *itertools.product(("chain", "static tree"), SETTINGS),
        *itertools.product(("deterministic tree", "dynamic tree"), ("filtered", "guided")),
    ],
)
def test_neighbouring_tokens_follow_the_target(drafting: str, setting: str) -> None:
    values, passes = draw_pairs(StrictRule(), drafting, setting)
    assert min(values) > 1e-3
    assert passes.min() == 1 and passes.max() == 3  # rows advance at their own pace


class KeepsWhatItRejects(StrictRule):
    def residual(self, target: Tensor, draft: Tensor | None, tokens: Tensor) -> Tensor:
        return target


@pytest.mark.parametrize("drafting", ["chain", "static tree", "deterministic tree"])
def test_a_rule_with_a_wrong_leftover_is_found_out(drafting: str) -> None:
    values, _ = draw_pairs(KeepsWhatItRejects(), drafting, "plain")
    assert min(values) < 1e-9


@pytest.fixture(scope="module")
def target() -> FlexARClass:
    return make_flex(seed=0, num_tokens=10)


def make_flex(seed: int, num_tokens: int, codebook_size: int = NUM_CODES) -> FlexARClass:
    torch.manual_seed(seed)
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}
    model = FlexARClass(codebook_size=codebook_size, num_tokens=num_tokens, num_classes=5, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


LABELS = torch.tensor([3, 1, 4])
GUIDED = ConstantGuidance(1.8)


def draw(model, rows: slice = slice(None), **options):
    options = {"drafter": MarkovDrafter(MarkovTarget(seed=5), DRAFTINGS["static tree"])} | options
    streams = ImageStreams.from_seeds(range(10, 13)[rows])
    return generate_speculative(model, LABELS[rows], streams=streams, **options)


@pytest.mark.parametrize("guidance", [ConstantGuidance(), GUIDED, LinearGuidance(3.0)])
@pytest.mark.parametrize("rule", [StrictRule(), GreedyRule()])
def test_greedy_tokens_are_those_of_plain_decoding(target, rule, guidance) -> None:
    options = {"sampling": SamplingParams(top_k=1), "guidance": guidance}
    streams = ImageStreams.from_seeds([1, 2, 3])
    expected = generate_ordered(target, LABELS, streams=streams, **options)
    drafter = IndependentDrafter(make_flex(seed=1, num_tokens=10), TREE)
    speculation = draw(target, rule=rule, drafter=drafter, **options)
    assert torch.equal(speculation.tokens.data, expected.data)
    assert speculation.tokens.layout == expected.layout
    perfect = draw(target, rule=rule, drafter=IndependentDrafter(target, CHAIN), **options)
    assert torch.equal(perfect.tokens.data, expected.data)
    assert perfect.statistics.row_passes.tolist() == [3, 3, 3]  # 9 tokens, 4 a pass
    assert perfect.statistics.mean_accepted_length.tolist() == [3, 3, 3]


@pytest.mark.parametrize("guidance", [ConstantGuidance(), GUIDED])
def test_every_image_stops_at_its_own_length(target, guidance) -> None:
    whole = draw(target, guidance=guidance)
    some = draw(target, guidance=guidance, num_tokens=[1, 4, 9])
    assert some.tokens.lengths.tolist() == [1, 4, 9]
    assert some.statistics.num_drawn.tolist() == [0, 3, 8]
    assert some.statistics.row_passes[0] == 0 and some.statistics.mean_accepted_length[0] == 1
    for row, length in enumerate((1, 4, 9)):
        assert torch.equal(some.tokens.data[row, :length], whole.tokens.data[row, :length])
        assert not some.tokens.data[row, length:].any()


def test_an_image_depends_on_its_own_seed_alone(target) -> None:
    together = draw(target, guidance=GUIDED)
    for row in range(3):
        alone = draw(target, slice(row, row + 1), guidance=GUIDED)
        assert torch.equal(alone.tokens.data[0], together.tokens.data[row])
        assert alone.statistics.row_passes[0] == together.statistics.row_passes[row]
    assert together.statistics.target_passes == together.statistics.row_passes.max()


def test_a_callback_sees_the_tokens_drawn_so_far(target) -> None:
    seen = []
    result = draw(target, on_step=lambda step, indices: seen.append((step, indices)))
    steps = [step for step, _ in seen]
    assert len(seen) == result.statistics.target_passes + 1
    assert (steps[0], steps[-1]) == (0, 9) and steps == sorted(set(steps))
    for step, indices in seen:
        assert torch.equal(indices[:, : step + 1], result.tokens.data[:, : step + 1])
    assert not seen[0][1][:, 1:].any() and torch.equal(seen[-1][1], result.tokens.data)


class KeepsSession(MarkovDrafter):
    def begin(self, start):
        sessions.append(super().begin(start))
        return sessions[-1]


sessions: list[MarkovSession] = []


def test_drafters_hear_what_was_kept_and_that_done_images_stay(target) -> None:
    sessions.clear()
    drafter = KeepsSession(MarkovTarget(seed=5), DRAFTINGS["static tree"])
    result = draw(target, drafter=drafter, guidance=GUIDED, num_tokens=[2, 10, 6])
    committed, roots = torch.zeros(3, dtype=torch.int64), result.tokens.data[:, 0]
    for outcome in sessions[0].outcomes:
        assert torch.equal(outcome.tree.tokens[:, 0], roots)
        assert outcome.reading.logits.shape[0] == 6 and outcome.logits.shape[0] == 3
        is_done = committed + 1 >= torch.tensor([2, 10, 6])
        assert torch.equal(outcome.counts == 0, is_done)
        assert (outcome.path[is_done] == -1).all() and torch.equal(outcome.new_roots[is_done], roots[is_done])
        for row in (~is_done).nonzero()[:, 0].tolist():
            nodes = outcome.path[row, : outcome.counts[row]]
            kept = outcome.tree.tokens[row, nodes]
            first = int(committed[row])
            assert torch.equal(kept, result.tokens.data[row, first : first + len(kept)])
        committed, roots = committed + outcome.counts, outcome.new_roots


def test_a_draft_does_not_pass_the_end_of_an_image(target) -> None:
    sessions.clear()
    draw(target, drafter=KeepsSession(MarkovTarget(seed=5), DRAFTINGS["static tree"]), num_tokens=3)
    assert all(int(outcome.tree.depths[outcome.tree.exists].max()) <= 2 for outcome in sessions[0].outcomes)


class Meddler(MarkovDrafter):
    """Changes its trees before they are shown."""

    def begin(self, start):
        session = super().begin(start)
        propose = session.propose
        session.propose = lambda *arguments: self.change(propose(*arguments), session)
        return session

    def change(self, tree: DraftTree, session: MarkovSession) -> DraftTree:
        raise NotImplementedError


class OtherRoot(Meddler):
    def change(self, tree: DraftTree, session: MarkovSession) -> DraftTree:
        return DraftTree((tree.tokens + 1) % NUM_CODES, tree.parents, tree.exists, tree.draft_probs)


class MoreThanPromised(Meddler):
    def change(self, tree: DraftTree, session: MarkovSession) -> DraftTree:
        session.max_nodes = 2
        return tree


class OtherVocabulary(Meddler):
    def change(self, tree: DraftTree, session: MarkovSession) -> DraftTree:
        return DraftTree(tree.tokens, tree.parents, tree.exists, tree.draft_probs[..., :-1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherRoot, "the root of a draft tree is the token that was drawn last"),
        (MoreThanPromised, "gave a tree of 7 nodes and promised 2"),
        (OtherVocabulary, "draws from 11 token ids, the target from 12"),
    ],
)
def test_drafters_that_break_their_word_are_refused(target, kind, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw(target, drafter=kind(MarkovTarget(seed=5), DRAFTINGS["static tree"]))


def test_what_cannot_be_decoded_is_refused(target) -> None:
    sizes = {
        "codebook_size": NUM_CODES,
        "num_tokens": 9,
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 24,
    }
    with pytest.raises(ValueError, match="NARClass does not decide one token after the other"):
        draw(NARClass(num_classes=5, **sizes))
    with pytest.raises(ValueError, match=r"num_tokens must be in 1\.\.10, got 11"):
        draw(target, num_tokens=11)
    with pytest.raises(
        ValueError, match=r"GreedyRule is for greedy decoding: it needs SamplingParams\(top_k=1\)"
    ):
        draw(target, rule=GreedyRule())
    with pytest.raises(ValueError, match="drafts 13 token ids, FlexARClass has 12"):
        check_same_vocabulary("a drafter", 13, target)
