"""A target whose next token depends on the last one alone, and drafters that know a law of the same kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.decoding.guidance import apply_guidance
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.drafter import DraftStart, Outcome
from vistok.decoding.speculative.tree import DraftTree
from vistok.decoding.speculative.tree_drafting import Level, TreeDrafting
from vistok.decoding.streams import UniformSource
from vistok.kernels.attention import TreeMask
from vistok.models.generators.base import NextTokenGenerator, Reading
from vistok.models.layers.kv_cache import KVCache

NUM_CODES = 12


class MarkovCache(KVCache):
    """Also holds the branches of guidance, `[r]`."""

    branches: Tensor


class MarkovTarget(NextTokenGenerator):
    """Reads logits off a table `[branches v+1 v]`, of which the last row is for the first token; 1 is no condition."""

    @register_to_config
    def __init__(self, *, seed: int = 0, num_tokens: int = 4, codebook_size: int = NUM_CODES) -> None:
        super().__init__()
        self.codebook_size, self.num_tokens = codebook_size, num_tokens
        generator = torch.Generator().manual_seed(seed)
        shape = (2, codebook_size + 1, codebook_size)
        self.table = nn.Parameter(torch.randn(shape, generator=generator) * 1.3)

    def null_condition(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, dtype=torch.int64)

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> MarkovCache:
        return MarkovCache(
            depth=1,
            batch_size=batch_size,
            num_heads=1,
            max_length=1 + (num_tokens or self.num_tokens),
            head_dim=1,
            dtype=torch.float32,
            device=self.device,
        )

    def read_prefix(self, condition: Tensor, cache: MarkovCache) -> Reading:
        cache.branches = condition
        return self._read(torch.full((len(condition), 1), self.codebook_size), cache)

    def step(self, indices: Tensor, cache: MarkovCache) -> Tensor:
        return self._read(indices, cache).logits

    def read_nodes(self, indices: Tensor, depths: Tensor, mask: TreeMask, cache: MarkovCache) -> Reading:
        assert mask.lengths.equal(cache.lengths) and depths.shape == indices.shape
        return self._read(indices, cache)

    def _read(self, indices: Tensor, cache: MarkovCache) -> Reading:
        block = indices[:, None, :, None].float()
        cache.layers[0].append(block, block)
        logits = self.table[cache.branches[:, None], indices]
        return Reading(logits, logits)

    @torch.no_grad()
    def probabilities(self, sampling: SamplingParams, guidance_scale: float) -> Tensor:
        """Of each token after each, `[v+1 v]`; the last row is for the first token."""
        guided = apply_guidance(self.table[0], self.table[1], guidance_scale)
        return token_probabilities(guided, sampling)


@dataclass(frozen=True)
class MarkovDrafter:
    """Follows the law of a `MarkovTarget`, be it the target itself or another."""

    model: MarkovTarget
    drafting: TreeDrafting

    def begin(self, start: DraftStart) -> MarkovSession:
        return MarkovSession(self, start)


class MarkovSession:
    def __init__(self, drafter: MarkovDrafter, start: DraftStart) -> None:
        self.table, self.drafting, self.start = drafter.model.table, drafter.drafting, start
        self.max_nodes = drafter.drafting.max_nodes
        self.num_passes = 0
        self.outcomes: list[Outcome] = []

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        def probs(tokens: Tensor, depth: int) -> Tensor:
            self.num_passes += 1
            logits = torch.cat([branch[tokens] for branch in self.table[: 1 + self.start.is_guided]])
            return self.start.probabilities(logits, (num_committed + depth + 1)[:, None].expand_as(tokens))

        def expand(level: Level) -> Tensor:
            return probs(level.tokens, level.depth)

        return self.drafting.grow(roots, probs(roots[:, None], 0)[:, 0], expand, streams)

    def commit(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
