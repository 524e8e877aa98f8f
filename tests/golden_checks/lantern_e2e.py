"""Goldens of LANTERN: whole images from a tiny target and its drafter, greedily and with recorded random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.decoding.guidance import ConstantGuidance, apply_guidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.accept import AcceptRule, Decision, Proposals
from vistok.decoding.speculative.drafter import DraftSession, DraftStart, Outcome
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.lantern import LanternGreedyRule, LanternRule, Ties
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import GreedyRule
from vistok.decoding.speculative.tree import NAMED_SHAPES, DraftTree, TreeShape
from vistok.decoding.streams import ImageStreams, UniformSource
from vistok.models import upstream
from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.generators.base import join_conditions
from vistok.models.generators.llamagen import LlamaGenText
from vistok.models.generators.text_features import TextFeatures

DRAWS_PER_NODE = 10  # of the release, however many children a node has


class Tape:
    """Recorded numbers, read one after the other; zeros once they are used up, as at the end of the last image."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.place = 0

    def ahead(self, count: int) -> Tensor:
        """The next `count` numbers, which stay ahead."""
        numbers = self.numbers[self.place : self.place + count]
        return torch.nn.functional.pad(numbers, (0, count - len(numbers)))

    def take(self, count: int) -> Tensor:
        """The next `count` numbers."""
        numbers = self.ahead(count)
        self.place += count
        return numbers


class RecordedRule:
    """A rule that takes its numbers from a tape, as many as it tries children."""

    def __init__(self, rule: AcceptRule, tape: Tape) -> None:
        self.rule, self.tape, self.is_lossless = rule, tape, rule.is_lossless

    def decide(self, target: Tensor, proposals: Proposals, uniforms: Tensor) -> Decision:
        decision = self.rule.decide(target, proposals, self.tape.ahead(uniforms.shape[1])[None])
        self.tape.take(int(decision.num_tried))
        return decision


class RecordedDraws:
    """The numbers of categorical draws in the order of the release: those of the tree, then that of the extra token."""

    def __init__(self, tape: Tape, shape: TreeShape | None) -> None:
        self.tape, self.shape = tape, shape
        self.is_tree_drawn = shape is None  # a dynamic tree takes no numbers

    def uniform(self, *shape: int) -> Tensor:
        if shape == (1,):
            self.is_tree_drawn = self.shape is None
            return self.tape.take(1)[None]
        if self.is_tree_drawn or self.shape is None:
            return torch.zeros(1, *shape)  # of the verification, whose numbers `RecordedRule` has
        self.is_tree_drawn = True
        return self._of_children(self.shape)[None]

    def _of_children(self, shape: TreeShape) -> Tensor:
        numbers = torch.zeros(shape.num_nodes - 1, dtype=torch.float64)
        for node, count in enumerate(shape.num_children):  # node ids rise level by level
            if count:
                children = shape.children(node)
                numbers[children.start - 1 : children.stop - 1] = self.tape.take(DRAWS_PER_NODE)[:count]
        return numbers


@dataclass(frozen=True)
class WatchedDrafter:
    """A drafter of which it is noted how many of its tokens were accepted at each pass."""

    drafter: EagleTreeDrafter
    accepted: list[int]

    def begin(self, start: DraftStart) -> WatchedSession:
        return WatchedSession(self.drafter.begin(start), self.accepted)


class WatchedSession:
    def __init__(self, session: DraftSession, accepted: list[int]) -> None:
        self.session, self.accepted = session, accepted
        self.max_nodes = session.max_nodes

    @property
    def num_passes(self) -> int:
        return self.session.num_passes

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        return self.session.propose(roots, num_committed, streams)

    def commit(self, outcome: Outcome) -> None:
        self.accepted.append(int(outcome.counts) - 1)
        self.session.commit(outcome)


@torch.inference_mode()
def check_images(case: GoldenCase) -> Comparison:
    """The features that the drafter reads, plain greedy decoding, and eight images with different rules and trees."""
    target, drafter = _load(case, "base"), _load(case, "drafter")
    assert isinstance(target, LlamaGenText) and isinstance(drafter, EagleDrafter)
    caption = TextFeatures(case.inputs["caption_embeddings"], case.inputs["caption_mask"].bool())
    comparison = Comparison()
    _compare_prefix(comparison, case, target, caption)
    _compare_plain(comparison, case, target, caption)
    for name, settings in case.meta["runs"].items():
        accepted: list[int] = []
        watched = WatchedDrafter(EagleTreeDrafter(drafter, _tree(case, settings)), accepted)
        rule, streams, sampling = _sources(case, name, settings)
        speculation = generate_speculative(
            target,
            caption,
            drafter=watched,
            rule=rule,
            streams=streams,
            num_tokens=settings["max_length"],
            sampling=sampling,
            guidance=ConstantGuidance(settings["cfg"]),
        )
        comparison.compare(
            f"outputs/{name}/tokens", speculation.tokens.data[0], case.outputs[f"{name}/tokens"]
        )
        expected = _within(case.outputs[f"{name}/accept_lengths"], settings["max_length"])
        comparison.compare(f"outputs/{name}/accept_lengths", torch.tensor(accepted), expected)
    return comparison


def _load(case: GoldenCase, part: str) -> Any:
    weights = {
        key.removeprefix(f"{part}/"): tensor
        for key, tensor in case.weights.items()
        if key.startswith(f"{part}/")
    }
    system = {"base": "lantern", "drafter": "lantern_drafter"}[part]
    return upstream.load(system, weights, case.config[part]).eval()


def _compare_prefix(
    comparison: Comparison, case: GoldenCase, target: LlamaGenText, text: TextFeatures
) -> None:
    rows = join_conditions(text, target.null_condition_for(text))
    reading = target.read_prefix(rows, target.new_cache(2))
    for name, actual in (
        ("prefill_features", reading.features),
        ("prefill_logits_last", reading.logits[:, 0]),
    ):
        comparison.compare(f"intermediate/{name}", actual, case.intermediate[name])


def _compare_plain(
    comparison: Comparison, case: GoldenCase, target: LlamaGenText, text: TextFeatures
) -> None:
    scale = case.config["cfg_scale"]
    tokens = generate_ordered(
        target,
        text,
        streams=ImageStreams.from_seeds([0]),
        sampling=SamplingParams(top_k=1),
        guidance=ConstantGuidance(scale),
    )
    comparison.compare("outputs/ar_greedy/tokens", tokens.data[0], case.outputs["ar_greedy/tokens"])
    expected = case.outputs["ar_greedy/cfg_logits"]
    rows = join_conditions(text, target.null_condition_for(text))
    cond, uncond = target(rows, tokens.data[:, : len(expected)].repeat(2, 1)).chunk(2)
    comparison.compare("outputs/ar_greedy/cfg_logits", apply_guidance(cond, uncond, scale)[0], expected)


def _tree(case: GoldenCase, settings: dict[str, Any]) -> TreeShape | DynamicTreeParams:
    if not settings["static_tree"]:
        return DynamicTreeParams(**case.config["dynamic_tree"])
    if "tree_choices" not in settings:
        return NAMED_SHAPES["naive_extend_57"]
    return TreeShape.of([tuple(map(int, path.split("."))) for path in settings["tree_choices"]])


def _sources(
    case: GoldenCase, name: str, settings: dict[str, Any]
) -> tuple[AcceptRule, UniformSource, SamplingParams]:
    table = NeighbourTable(case.inputs["neighbor_table"].int())
    k, delta = settings["lantern_k"], settings["lantern_delta"]
    if settings["temperature"] == 0:
        ties: Ties = "node" if settings["static_tree"] else "leaf"
        rule = LanternGreedyRule(table, k, delta, ties) if settings["lantern"] else GreedyRule()
        return rule, ImageStreams.from_seeds([0]), SamplingParams(top_k=1)
    tree = _tree(case, settings)
    draws = RecordedDraws(
        Tape(case.inputs[f"{name}/sample_uniforms"]), tree if isinstance(tree, TreeShape) else None
    )
    released = LanternRule(table, k if settings["lantern"] else 0, delta, mode="official")
    rule = RecordedRule(released, Tape(case.inputs[f"{name}/accept_uniforms"]))
    return rule, draws, SamplingParams(temperature=settings["temperature"], top_k=settings["top_k"])


def _within(accepted: Tensor, num_tokens: int) -> Tensor:
    """Accepted tokens per pass as far as the image goes: the release runs over its end and cuts afterwards."""
    within, committed = [], 0
    for count in accepted.tolist():
        if committed + 1 >= num_tokens:
            break
        within.append(min(count, num_tokens - 1 - committed))
        committed += count + 1
    return torch.tensor(within)


CHECKS: dict[str, Check] = {"e2e": check_images}
