"""Speculative decoding keeps a device busy: no pass makes the host wait, and it asks for the end once a pass at most."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.decoding.speculative.test_eagle import class_target, drafter_for
from tests.host_sync import HostSyncError, no_host_sync
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative import generate
from vistok.decoding.speculative.accept import AcceptRule
from vistok.decoding.speculative.drafter import Drafter
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.decoding.speculative.drafters.neighbours import NeighbourDrafter
from vistok.decoding.speculative.drafters.recycling import RecyclingDrafter
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.lantern import LanternGreedyRule, LanternRule
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import GreedyRule, StrictRule
from vistok.decoding.speculative.tree import TreeShape
from vistok.decoding.streams import ImageStreams
from vistok.kernels.attention import AttentionMask
from vistok.kernels.decode_attention import decode_attention
from vistok.models.generators.llamagen import LlamaGenClass
from vistok.models.layers import layer_cache

CHAIN, TREE = TreeShape.chain(3), TreeShape.from_counts([[2], [2, 1]])
TABLE = NeighbourTable(torch.stack([(torch.arange(20) + i) % 20 for i in (1, 2)], dim=1).int())
GREEDY = SamplingParams(top_k=1)


@pytest.fixture(autouse=True)
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own look at lengths and masks on the CPU, where it costs nothing."""

    def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        dense = None if mask is None else mask.dense(q.shape[-2], k.shape[-2], q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=dense)

    plain_decoding = functools.partial(decode_attention, backend="reference")
    monkeypatch.setattr(layer_cache, "attention", plain_attention)
    monkeypatch.setattr(layer_cache, "decode_attention", plain_decoding)


@pytest.fixture(scope="module")
def target() -> LlamaGenClass:
    return class_target()


def make_drafter(name: str, target: LlamaGenClass) -> Drafter:
    if name.startswith("eagle"):
        tree = {"chain": CHAIN, "tree": TREE, "dynamic": DynamicTreeParams(2, 1, 5)}[name.split()[1]]
        return EagleTreeDrafter(drafter_for(target), tree)
    return {
        "independent": IndependentDrafter(target),
        "jacobi": JacobiDrafter(window=3),
        "copies": NeighbourDrafter(TREE),
        "recycling": RecyclingDrafter(TREE),
    }[name]


def speculate(target: LlamaGenClass, drafter: Drafter, **options) -> generate.Speculation:
    options = {"guidance": ConstantGuidance(1.5), "num_tokens": [16, 9]} | options
    streams = ImageStreams.from_seeds([3, 4])
    return generate.generate_speculative(
        target, torch.tensor([0, 2]), drafter=drafter, streams=streams, **options
    )


class Watch:
    """Runs every pass under `no_host_sync`, and counts how often the end is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_questions = 0
        advance, is_done = generate._Loop.advance, generate._Loop.is_done

        def watched_advance(loop: generate._Loop, streams: ImageStreams) -> None:
            with no_host_sync():
                advance(loop, streams)

        def watched_is_done(loop: generate._Loop) -> bool:
            try:
                with no_host_sync():
                    return is_done(loop)
            except HostSyncError:
                self.num_questions += 1
                return is_done(loop)

        monkeypatch.setattr(generate._Loop, "advance", watched_advance)
        monkeypatch.setattr(generate._Loop, "is_done", watched_is_done)


@pytest.mark.parametrize(
    ("name", "rule", "sampling"),
    [
        ("eagle chain", StrictRule(), SamplingParams(top_k=8, top_p=0.9)),
        ("eagle chain", LanternRule(TABLE, 2, 0.2), SamplingParams()),
        ("eagle tree", StrictRule(), SamplingParams()),
        ("eagle tree", LanternGreedyRule(TABLE, 2, 0.2), GREEDY),
        ("eagle dynamic", GreedyRule(), GREEDY),
        ("independent", StrictRule(), SamplingParams()),
        ("jacobi", StrictRule(), SamplingParams()),
        ("copies", StrictRule(), SamplingParams()),
        ("recycling", StrictRule(), SamplingParams()),
    ],
)
def test_a_pass_does_not_make_the_host_wait(
    target: LlamaGenClass,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    rule: AcceptRule,
    sampling: SamplingParams,
) -> None:
    options = {"rule": rule, "sampling": sampling}
    expected = speculate(target, make_drafter(name, target), **options)
    Watch(monkeypatch)
    found = speculate(target, make_drafter(name, target), **options)
    assert torch.equal(found.tokens.data, expected.tokens.data)


def test_the_end_is_asked_for_only_where_it_can_have_come(
    target: LlamaGenClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    result = speculate(target, IndependentDrafter(target, CHAIN))
    passes = result.statistics.target_passes
    # The first token is the prefix's, and a pass gives 4 at most: 15 take 4 passes.
    assert watch.num_questions == passes - 4 + 1
    watch.num_questions = 0
    perfect = speculate(target, IndependentDrafter(target, CHAIN), guidance=None)
    assert perfect.statistics.target_passes == 4 and watch.num_questions == 1


def test_chains_are_verified_as_the_walk_down_a_tree_does(
    target: LlamaGenClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SameRule(StrictRule):
        """For which there is no short cut."""

    short_cuts: list[Tensor] = []
    verify_chain = generate.verify_chain

    def counted(tokens: Tensor, *arguments, **options) -> tuple[Tensor, Tensor]:
        short_cuts.append(tokens)
        return verify_chain(tokens, *arguments, **options)

    monkeypatch.setattr(generate, "verify_chain", counted)
    drafter = EagleTreeDrafter(drafter_for(target), CHAIN)
    found = speculate(target, drafter)
    num_short_cuts = len(short_cuts)
    expected = speculate(target, drafter, rule=SameRule())
    assert num_short_cuts == len(short_cuts) == found.statistics.target_passes
    assert torch.equal(found.tokens.data, expected.tokens.data)
    assert torch.equal(found.statistics.row_passes, expected.statistics.row_passes)


def test_logits_that_are_no_distribution_are_told_with_their_step(target: LlamaGenClass) -> None:
    class Broken(LlamaGenClass):
        def read_nodes(self, indices, depths, mask, cache):
            reading = super().read_nodes(indices, depths, mask, cache)
            reading.logits[1] = float("nan")
            return reading

    broken = Broken(**{name: value for name, value in target.config.items() if not name.startswith("_")})
    broken.load_state_dict(target.state_dict())
    drafter = EagleTreeDrafter(drafter_for(target), CHAIN)
    with pytest.raises(ValueError, match="at step 1 of 16 the logits of row 1 were no distribution"):
        speculate(broken.eval(), drafter, guidance=None)
