"""Drafting with an EAGLE network: it must follow the target exactly, whatever the tree, and keep its own cache right."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.tiny import GENERATOR
from vistok.decoding.guidance import ConstantGuidance, StepsGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.drafter import DraftSession, DraftStart, Outcome
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.generate import Speculation, generate_speculative
from vistok.decoding.speculative.tree import DraftTree, TreeShape
from vistok.decoding.streams import ImageStreams, UniformSource
from vistok.kernels.attention import CausalMask
from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.generators.base import NextTokenGenerator, join_conditions
from vistok.models.generators.llamagen import LlamaGenClass
from vistok.models.generators.text_ar import TextAR
from vistok.training.target_data import read_image

TREES = {
    "chain": TreeShape.chain(3),
    "static": TreeShape.of([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]),
    "dynamic": DynamicTreeParams(top_k=3, depth=2, total_tokens=8),
}
GUIDANCE = ConstantGuidance(2.0)
TOKENS = 16


def class_target() -> LlamaGenClass:
    torch.manual_seed(0)
    model = LlamaGenClass(
        codebook_size=20, num_tokens=TOKENS, num_classes=3, dim=16, depth=2, num_heads=2, mlp_dim=24
    )
    return _random(model)


def text_target() -> TextAR:
    torch.manual_seed(0)
    return _random(TextAR(**GENERATOR | {"num_tokens": TOKENS}))


def _random(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def drafter_for(target: NextTokenGenerator, **changes) -> EagleDrafter:
    sizes = {
        "codebook_size": 20,
        "num_tokens": TOKENS,
        "prefix_length": 0,
        "dim": 16,
        "num_heads": 2,
        "mlp_dim": 24,
        "own_tokens": False,
    }
    torch.manual_seed(1)
    return _random(EagleDrafter(**sizes | changes))


def draw(
    target: NextTokenGenerator, condition: Tensor, drafter: object, seeds: list[int], **options
) -> Speculation:
    return generate_speculative(
        target,
        condition,
        drafter=drafter,
        streams=ImageStreams.from_seeds(seeds),
        **{"guidance": GUIDANCE} | options,
    )


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", ["class", "text"])
def test_greedy_decoding_is_plain_greedy_decoding(kind: str, tree: str) -> None:
    target = class_target() if kind == "class" else text_target()
    condition = torch.tensor([0, 2, 1]) if kind == "class" else target.encode_text(["cat", "a dog", "ox"])
    network = drafter_for(target, positions="grid" if kind == "class" else "table")
    sampling = SamplingParams(top_k=1)
    plain = generate_ordered(
        target, condition, streams=ImageStreams.from_seeds([0, 1, 2]), sampling=sampling, guidance=GUIDANCE
    )
    made = draw(target, condition, EagleTreeDrafter(network, TREES[tree]), [0, 1, 2], sampling=sampling)
    assert torch.equal(made.tokens.data, plain.data)
    assert made.statistics.draft_passes > made.statistics.target_passes


@pytest.mark.parametrize("tree", TREES)
def test_an_image_does_not_depend_on_its_batch(tree: str) -> None:
    target = class_target()
    drafter = EagleTreeDrafter(drafter_for(target), TREES[tree])
    together = draw(target, torch.tensor([0, 1, 2, 1]), drafter, [5, 6, 7, 8]).tokens.data
    for row, (label, seed) in enumerate(zip([0, 1, 2, 1], [5, 6, 7, 8], strict=True)):
        alone = draw(target, torch.tensor([label]), drafter, [seed]).tokens.data
        assert torch.equal(alone[0], together[row])


@dataclass
class Watched:
    """Notes what was drafted from, per image and position."""

    drafter: EagleTreeDrafter
    laws: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def begin(self, start: DraftStart) -> WatchedSession:
        return WatchedSession(self.drafter.begin(start), self.laws)


class WatchedSession:
    def __init__(self, session: DraftSession, laws: dict) -> None:
        self.session, self.laws, self.max_nodes = session, laws, session.max_nodes

    @property
    def num_passes(self) -> int:
        return self.session.num_passes

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        tree = self.session.propose(roots, num_committed, streams)
        assert tree.draft_probs is not None
        for row, place in enumerate(num_committed.tolist()):
            self.laws.setdefault((row, place + 1), tree.draft_probs[row, 0].clone())
        return tree

    def commit(self, outcome: Outcome) -> None:
        self.session.commit(outcome)


@pytest.mark.parametrize("prefix_length", [0, 3])
@torch.no_grad()
def test_it_drafts_from_what_the_target_really_read(prefix_length: int) -> None:
    """The law below every root is that of one pass over the true features of the finished image, guided position by
    position.
    """
    target = text_target()
    network = drafter_for(target, positions="line", prefix_length=prefix_length, own_tokens=True)
    condition = target.encode_text(["cat", "a dog"])
    guidance, sampling = StepsGuidance(3.0, 7), SamplingParams(temperature=0.8, top_p=0.9)
    watched = Watched(EagleTreeDrafter(network, TREES["static"]))
    indices = draw(target, condition, watched, [3, 4], guidance=guidance, sampling=sampling).tokens.data
    rows = join_conditions(condition, target.null_condition_for(condition))
    prefix, nodes = read_image(target, rows, indices)
    features = torch.cat([prefix.features[:, -prefix_length - 1 :], nodes.features], dim=1)[:, :-1]
    tokens = torch.nn.functional.pad(indices[:, :-1], (prefix_length, 0)).repeat(2, 1)
    places = torch.arange(features.shape[1])
    following = network(features, network.embed_tokens(tokens), places, CausalMask())
    cond, uncond = target.features_to_logits(following)[:, prefix_length:].chunk(2)
    assert len(watched.laws) > 8
    for (row, place), law in watched.laws.items():
        if place < TOKENS:
            scale = guidance.at(place, TOKENS)
            logits = uncond[row, place - 1] + scale * (cond - uncond)[row, place - 1]
            torch.testing.assert_close(law, token_probabilities(logits, sampling), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_guidance_one_branch_is_drafted() -> None:
    target = class_target()
    network = drafter_for(target)
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    draw(target, torch.tensor([0, 1]), EagleTreeDrafter(network), [0, 1], guidance=ConstantGuidance(1.0))
    hook.remove()
    assert set(rows) == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 19}, "EagleDrafter drafts 19 token ids, LlamaGenClass has 20"),
        ({"dim": 8}, "a width of 8, LlamaGenClass has 16"),
        ({"num_tokens": 25}, "tokens per image of 25, LlamaGenClass has 16"),
        ({"prefix_length": 1}, "reads 1 condition positions in front of the last, LlamaGenClass has 0"),
    ],
)
def test_a_drafter_of_another_target_is_refused(changes: dict, message: str) -> None:
    target = class_target()
    with pytest.raises(ValueError, match=message):
        draw(target, torch.tensor([0]), EagleTreeDrafter(drafter_for(target, **changes)), [0])
