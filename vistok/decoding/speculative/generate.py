"""Speculative decoding: a drafter proposes a tree, the target reads it in one pass, a rule says what is kept.

Leviathan et al. 2023 and Chen et al. 2023 for chains, Miao et al. 2024 (SpecInfer) for trees, Li et al. 2024 (EAGLE)
for drafters that read the target's features; here for batches of images, each of which accepts as many tokens as it
happens to. With a lossless rule the tokens follow the same distribution as those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule
from vistok.decoding.ordered import StepCallback, check_drawn, check_num_tokens
from vistok.decoding.sampling import SamplingParams, draw, token_probabilities
from vistok.decoding.speculative.accept import AcceptRule, Proposals
from vistok.decoding.speculative.drafter import Drafter, DraftSession, DraftStart, Outcome
from vistok.decoding.speculative.lantern import LanternGreedyRule
from vistok.decoding.speculative.strict import GreedyRule, StrictRule
from vistok.decoding.speculative.tree import DraftTree
from vistok.decoding.speculative.verify import verify
from vistok.decoding.streams import UniformSource
from vistok.kernels.attention import TreeMask
from vistok.kernels.verification import verify_chain
from vistok.models.generators.base import (
    Condition,
    NextTokenGenerator,
    OrderedGenerator,
    Reading,
    join_conditions,
)
from vistok.models.layers.kv_cache import KVCache
from vistok.order import RasterOrder
from vistok.tokens import Tokens


@dataclass(frozen=True)
class SpeculationStatistics:
    """What it took.

    Args:
        num_drawn: `[b]` int64, tokens after the first, which the prefix gives.
        row_passes: `[b]` int64, target passes until the image was done, the prefix not counted.
        target_passes: of the whole batch, the prefix not counted.
        draft_passes: forward passes of the drafter.
    """

    num_drawn: Tensor
    row_passes: Tensor
    target_passes: int
    draft_passes: int

    @property
    def mean_accepted_length(self) -> Tensor:
        """`[b]` tokens per target pass, the one drawn after the accepted ones included; plain decoding has 1.0.

        The prefix is not counted, nor what a last pass has beyond the end. 1.0 where the prefix was all it took.
        """
        return torch.where(self.row_passes > 0, self.num_drawn / self.row_passes.clamp_min(1), 1.0)


@dataclass(frozen=True)
class Speculation:
    """Tokens, and what it took to draw them."""

    tokens: Tokens
    statistics: SpeculationStatistics


@torch.no_grad()
def generate_speculative(
    model: OrderedGenerator,
    condition: Condition,
    *,
    drafter: Drafter,
    rule: AcceptRule | None = None,
    streams: UniformSource,
    num_tokens: int | Sequence[int] | Tensor | None = None,
    sampling: SamplingParams | None = None,
    guidance: GuidanceSchedule | None = None,
    null_condition: Condition | None = None,
    on_step: StepCallback | None = None,
) -> Speculation:
    """Sample the tokens of a batch of images with fewer passes of the model.

    The tokens of an image depend neither on the others of the batch nor, unless the rule is a `LanternGreedyRule`, which
    looks at whole trees, on where it stops. Greedy decoding is
    `SamplingParams(top_k=1)`, with the strict rule or one that is made for it.

    Args:
        model: a next-token generator, the target.
        condition: what the model is conditioned on, one row per image; see its `prefill`.
        drafter: proposes tokens.
        rule: which of them are kept; `StrictRule` by default, which keeps the distribution of plain decoding.
        streams: at each pass, the uniforms that the drafter draws with, one for each node below the root of its
            largest tree, and one for the token after the accepted ones.
        num_tokens: stop after so many tokens, one number for all images or one per image `[b]`; all by default.
        sampling: how a token is drawn.
        guidance: scale per token; with a scale of 1.0 the unconditional branch is not computed at all.
        null_condition: of the unconditional branch, one row per image; the model's own by default.
        on_step: called after every pass with the last position that all images have, and the tokens drawn so far, zeros
            elsewhere.

    Raises:
        ValueError: the model is no next-token generator, the drafter is not one for it or does not keep to its own
            `max_nodes`, the rule is greedy and the sampling is not, `num_tokens` is out of range or not one per image;
            there is no image to draw; the logits of a token are no distribution.
    """
    if not isinstance(model, NextTokenGenerator):
        raise ValueError(
            f"{type(model).__name__} does not decide one token after the other, which speculative decoding needs: "
            "decode it plainly"
        )
    sampling, guidance, judge = (
        sampling or SamplingParams(),
        guidance or ConstantGuidance(),
        rule or StrictRule(),
    )
    _check_greedy(judge, sampling)
    lengths = check_num_tokens(num_tokens, len(condition), model.num_tokens)
    is_guided = guidance.scale != 1.0
    rows = condition
    if is_guided:
        null = model.null_condition_for(condition) if null_condition is None else null_condition
        rows = join_conditions(condition, null)
    rows = rows.to(model.device)
    most = int(lengths.max())
    cache = model.new_cache(len(rows), most)
    reading = model.read_prefix(rows, cache)
    cache.split_rows()
    scales = torch.tensor([guidance.at(p, most) for p in range(most)], device=model.device)
    start = DraftStart(model, rows, reading, scales, sampling, is_guided, len(condition))
    loop = _Loop(start, cache, drafter.begin(start), judge, lengths.to(model.device))
    loop.draw_first(streams)
    while True:
        if on_step is not None:
            on_step(loop.last_position, loop.indices.clamp_min(0))
        if loop.is_done():
            break
        loop.advance(streams)
    return loop.result()


def _check_greedy(rule: AcceptRule, sampling: SamplingParams) -> None:
    if isinstance(rule, GreedyRule | LanternGreedyRule) and sampling.top_k != 1:
        raise ValueError(f"{type(rule).__name__} is for greedy decoding: it needs SamplingParams(top_k=1)")


class _Loop:
    """A batch in progress: what is drawn, and how far each image is."""

    def __init__(
        self, start: DraftStart, cache: KVCache, session: DraftSession, rule: AcceptRule, lengths: Tensor
    ) -> None:
        self.start, self.model, self.cache = start, start.target, cache
        self.session, self.rule, self.lengths = session, rule, lengths
        # This rule weighs neighbours against each other, of which top_k=1 would leave none.
        self.sampling = SamplingParams() if isinstance(rule, LanternGreedyRule) else start.sampling
        # What is drawn beyond the end of an image is written to a column behind them.
        room = (start.batch_size, start.num_tokens + 1)
        self.written = torch.zeros(room, dtype=torch.int64, device=lengths.device)
        self.roots = torch.zeros_like(lengths)
        self.num_committed = torch.zeros_like(lengths)
        self.row_passes = torch.zeros_like(lengths)
        self.num_passes = 0
        self.most_drawn = 1  # tokens that an image can have by now, as far as the host knows

    @property
    def indices(self) -> Tensor:
        """`[b n]`, zeros where nothing is drawn yet; -1 where that failed."""
        return self.written[:, :-1]

    def is_done(self) -> bool:
        """Whether all images are. The host asks the device only after as many passes as can be enough."""
        return self.most_drawn >= self.start.num_tokens and not bool(self.is_open.any())

    @property
    def is_open(self) -> Tensor:
        """`[b]`: whether tokens of the image are still to be drawn after the root."""
        return self.num_committed + 1 < self.lengths

    @property
    def last_position(self) -> int:
        """The last that is drawn in all images that go so far."""
        most = torch.full_like(self.roots, self.indices.shape[1] - 1)
        return int(torch.where(self.is_open, self.num_committed, most).min())

    def draw_first(self, streams: UniformSource) -> None:
        """The token that follows the prefix. The rule has a say: a greedy one takes the most probable."""
        logits = self.start.guide(self.start.reading.logits, self.num_committed[:, None])[:, 0]
        target = token_probabilities(logits, self.sampling)
        nothing = Proposals(self.indices[:, :0], self.indices[:, :0].bool())
        drawn = draw(self.rule.decide(target, nothing, target[:, :0]).leftover, streams.uniform(1)[:, 0])
        self.written[:, 0] = drawn
        self.roots = drawn.clamp_min(0)

    def advance(self, streams: UniformSource) -> None:
        """Draft, verify, commit."""
        tree = self._draft(streams)
        reading = self._read(tree)
        positions = self.num_committed[:, None] + 1 + tree.depths  # of what follows each node
        logits = self.start.guide(reading.logits, positions)
        uniforms = torch.cat([streams.uniform(self.session.max_nodes), streams.uniform(1)], dim=1)
        uniforms = uniforms.to(self.roots.device, non_blocking=True)
        probs = token_probabilities(logits, self.start.sampling)
        judged = probs if self.sampling == self.start.sampling else token_probabilities(logits, self.sampling)
        path, num_accepted, drawn = self._verify(tree, judged, uniforms)
        # Images that are done stay as they are, so that their neighbours can go on.
        counts = (num_accepted + 1) * self.is_open
        path = path.masked_fill(~self.is_open[:, None], -1)
        self.cache.commit(self.start.rows(path), self.start.rows(counts))
        self._write(tree, path, drawn, counts)
        # A token that could not be drawn is known by its -1; the model reads another, so that the loop goes on.
        new_roots = torch.where(self.is_open, drawn.clamp_min(0), self.roots)
        self.row_passes += self.is_open
        self.num_passes += 1
        self.most_drawn += tree.limits.max_depth + 1
        self.num_committed, self.roots = self.num_committed + counts, new_roots
        self.session.commit(Outcome(tree, reading, logits, probs, path, counts, new_roots))

    def _verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The path that is kept, filled up with -1, the number of accepted nodes, and the token drawn behind them."""
        count = tree.tokens.shape[1] - 1
        if type(self.rule) is not StrictRule or not tree.limits.is_chain:
            verified = verify(tree, target, self.rule, uniforms[:, :-1])
            return verified.path, verified.num_accepted, draw(verified.extra, uniforms[:, -1])
        num_accepted, drawn = verify_chain(
            tree.tokens[:, 1:],
            tree.draft_probs,
            target,
            torch.cat([uniforms[:, :count], uniforms[:, -1:]], dim=1),
            num_drafted=tree.exists.sum(dim=1) - 1,
        )
        nodes = torch.arange(count + 1, device=drawn.device)
        return torch.where(nodes <= num_accepted[:, None], nodes, -1), num_accepted, drawn

    def _draft(self, streams: UniformSource) -> DraftTree:
        """The drafter's tree as far as the image goes.

        A node at the last position stays: without it, the last token would come about in another way in an image that
        stops there than in one that goes on.
        """
        tree = self.session.propose(self.roots, self.num_committed, streams)
        vocabulary, most = self.model.codebook_size, self.session.max_nodes
        if tree.tokens.shape[1] > most + 1:
            raise ValueError(
                f"the drafter gave a tree of {tree.tokens.shape[1] - 1} nodes and promised {most}"
            )
        if tree.bounds is None and not torch.equal(tree.tokens[:, 0], self.roots):
            raise ValueError(
                "the root of a draft tree is the token that was drawn last; the drafter gave another"
            )
        if tree.draft_probs is not None and tree.draft_probs.shape[2] != vocabulary:
            raise ValueError(
                f"the drafter draws from {tree.draft_probs.shape[2]} token ids, the target from {vocabulary}: "
                "use a drafter made for this generator's codebook"
            )
        return tree.limited(self.lengths - 1 - self.num_committed)

    def _read(self, tree: DraftTree) -> Reading:
        rows = self.start.rows
        mask = TreeMask(self.cache.lengths, rows(tree.ancestors))
        return self.model.read_nodes(rows(tree.tokens), rows(tree.depths), mask, self.cache)

    def _write(self, tree: DraftTree, path: Tensor, new_roots: Tensor, counts: Tensor) -> None:
        """Put what follows each root into `indices`, as far as it belongs to the image."""
        accepted = tree.tokens.gather(1, path[:, 1:].clamp_min(0))  # [b d-1]
        tokens = torch.cat([accepted, new_roots[:, None]], dim=1)  # [b d]
        tokens = tokens.scatter(1, (counts - 1).clamp_min(0)[:, None], new_roots[:, None])
        ranks = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.num_committed[:, None] + 1 + ranks
        is_new = (ranks < counts[:, None]) & (places < self.lengths[:, None])
        self.written.scatter_(1, torch.where(is_new, places, self.start.num_tokens), tokens)

    def result(self) -> Speculation:
        """Of a batch of which no image is open."""
        model = self.model
        check_drawn(self.indices, RasterOrder(self.start.num_tokens))
        tokens = Tokens(indices=self.indices, codebook_size=model.codebook_size, layout=model.layout)
        statistics = SpeculationStatistics(
            self.lengths - 1, self.row_passes, self.num_passes, self.session.num_passes
        )
        return Speculation(tokens.keep(self.lengths), statistics)
