"""A small generator of the same tokens drafts for a large one (Leviathan et al. 2023; Chen et al. 2023).

It reads the same condition, on both branches of guidance, with a cache of its own. After every verification it reads what
the target has read, then grows the next tree below the root; the keys of a tree are forgotten once it is grown.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vistok.decoding.speculative.draft_length import AcceptanceRate, ChainDrafting, DraftLength, FixedLength
from vistok.decoding.speculative.drafter import DraftStart, Outcome, check_same_vocabulary
from vistok.decoding.speculative.tree import DraftTree, TreeShape
from vistok.decoding.speculative.tree_drafting import (
    Level,
    TreeDrafting,
    drafter_sampling,
    is_greedy,
    static_drafting,
)
from vistok.decoding.streams import UniformSource
from vistok.kernels.attention import TreeMask
from vistok.models.generators.base import NextTokenGenerator

CONDITION_SIZES = ("num_classes", "text_length", "text_dim", "text_encoder", "max_text_length")


@dataclass(frozen=True)
class IndependentDrafter:
    """Draws trees from a generator of the same kind as the target.

    Args:
        model: trained on the same tokens and conditions; on the target's device.
        tree: a fixed shape, or when to stop drafting a chain.
    """

    model: NextTokenGenerator
    tree: TreeShape | DraftLength = field(default_factory=FixedLength)

    def begin(self, start: DraftStart) -> IndependentSession:
        """Start with a batch.

        Raises:
            ValueError: the model has another vocabulary, layout or kind of condition than the target.
        """
        model, target = self.model, start.target
        check_same_vocabulary(type(model).__name__, model.codebook_size, target)
        ours, theirs = (f"{one.num_tokens} tokens, {one.layout}" for one in (model, target))
        if ours != theirs:
            raise ValueError(
                f"the drafter makes images of another layout ({ours}) than the target ({theirs})"
            )
        if type(model) is not type(target):
            raise ValueError(
                f"a {type(model).__name__} reads other conditions than a {type(target).__name__}: "
                "the drafter must be of the target's family"
            )
        for name in CONDITION_SIZES:
            if model.config.get(name) != target.config.get(name):
                raise ValueError(
                    f"{name} of the drafter is {model.config.get(name)}, that of the target {target.config.get(name)}: "
                    "both must read the same conditions"
                )
        return IndependentSession(model, self.tree, start)


class IndependentSession:
    """The state of a batch: the drafter's cache, and the tokens that it has not read yet."""

    def __init__(self, model: NextTokenGenerator, tree: TreeShape | DraftLength, start: DraftStart) -> None:
        self.model = model
        self.tree = tree
        self.target_sampling = start.sampling
        self.start = replace(start, sampling=drafter_sampling(start.sampling))
        device = start.reading.logits.device
        self.acceptance = AcceptanceRate.unknown(start.batch_size, device)
        self.max_nodes = self._drafting().max_nodes
        self.cache = model.new_cache(len(start.reading.logits), start.num_tokens)
        model.read_prefix(start.condition.to(device), self.cache)
        self.cache.split_rows()
        self.num_passes = 1
        # [b m], accepted tokens and the root; None until the first root is drawn.
        self.unread: Tensor | None = None
        self.counts = torch.ones(start.batch_size, dtype=torch.int64, device=device)

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        """See `DraftSession.propose`."""
        unread = roots[:, None] if self.unread is None else self.unread
        logits = self._read_accepted(unread, self.counts)
        probs = self.start.probabilities(logits, num_committed[:, None] + 1)[:, 0]

        def expand(level: Level) -> Tensor:
            depths = torch.full_like(level.tokens, level.depth - 1)  # behind the root
            logits = self._read(level.tokens, depths, level.ancestors)
            positions = num_committed[:, None] + level.depth + 1  # [b 1], of the tokens that follow
            return self.start.probabilities(logits, positions.expand_as(level.tokens))

        tree = self._drafting().grow(roots, probs, expand, streams)
        self.cache.rollback_rows(self.cache.lengths)
        return tree

    def commit(self, outcome: Outcome) -> None:
        """See `DraftSession.commit`."""
        accepted = outcome.tree.tokens.gather(1, outcome.path.clamp_min(0)).roll(-1, dims=1)
        last = (outcome.counts - 1).clamp_min(0)[:, None]
        self.unread = accepted.scatter(1, last, outcome.new_roots[:, None])  # the root before them was read
        self.counts = outcome.counts
        num_drafted = outcome.tree.exists.sum(dim=1) - 1
        self.acceptance = self.acceptance.after(num_drafted, last[:, 0])

    def _drafting(self) -> TreeDrafting:
        if isinstance(self.tree, TreeShape):
            return static_drafting(self.tree, self.target_sampling)
        return ChainDrafting(self.tree, self.acceptance.rate, is_greedy(self.target_sampling))

    def _read_accepted(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Read the first `counts [b]` of `tokens [b m]` for good; returns the logits after the last, `[r 1 v]`."""
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self._read(tokens, steps, (steps[0] <= steps[0][:, None]).expand(len(tokens), -1, -1))
        rows = self.start.rows(counts)
        self.cache.commit(self.start.rows(steps), rows)
        last = (rows - 1).clamp_min(0)[:, None, None]
        return logits.gather(1, last.expand(-1, 1, logits.shape[2]))

    def _read(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        """One pass over nodes `[b n]`; returns their logits `[r n v]`."""
        rows = self.start.rows
        self.num_passes += 1
        mask = TreeMask(self.cache.lengths, rows(ancestors))
        return self.model.read_nodes(rows(tokens), rows(depths), mask, self.cache).logits
