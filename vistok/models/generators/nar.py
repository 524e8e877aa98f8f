"""NAR: next-neighbor generators over the grid of a VQ tokenizer (He et al. 2025, sections 3.2 and 3.3).

LlamaGen's transformer with one more block and two heads. After all blocks but the last, a head predicts the token to the
right of a position; after the last, another the token below it. A token is predicted from both neighbours, by the mean of
the logits, so all tokens of one anti-diagonal are decided together: 2g - 1 steps for a grid of g x g tokens. The tokens of
a diagonal see each other once they are decided.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.kernels.attention import TreeMask
from vistok.models.generators.caption_cleaning import clean_caption
from vistok.models.generators.llamagen import PRESETS as LLAMAGEN_PRESETS
from vistok.models.generators.llamagen import (
    ClassPrefix,
    GridCache,
    GridOptions,
    GridTransformer,
    TextPrefix,
    init_weights,
    make_norm,
)
from vistok.order import DiagonalOrder

PRESETS = {  # published name -> sizes; `depth` does not count the block of the second head
    **{name: LLAMAGEN_PRESETS[name] for name in ("B", "L", "XL", "XXL")},
    "M": {"depth": 18, "dim": 1024, "num_heads": 16, "mlp_dim": 2816},
}


def merge_heads(right: Tensor, below: Tensor, step: int, grid_size: int) -> Tensor:
    """The logits of one anti-diagonal from those that the diagonal before it gives (He et al. 2025, section 3.2).

    The mean of both heads where both neighbours exist; the first row has only one to its left, the first column only one
    above. The first token follows from the condition alone, by the mean of both heads.

    Args:
        right: `[b k v]`, what the tokens of the diagonal before, by ascending row, say of the tokens right of them; for
            step 0 what the last position of the condition says.
        below: `[b k v]`, what they say of the tokens below them.
        step: the diagonal to predict, 0 to `2 * grid_size - 2`.
        grid_size: tokens along one side of the grid.

    Returns:
        `[b k' v]`, by ascending row.
    """
    if step == 0:
        return (right + below) / 2
    between = (right[:, 1:] + below[:, :-1]) / 2
    if step >= grid_size:
        return between
    return torch.cat([right[:, :1], between, below[:, -1:]], dim=1)


class NAR(GridTransformer):
    """What both kinds of conditioning share: next neighbor, two heads."""

    def __init__(self, options: GridOptions, prefix: ClassPrefix | TextPrefix) -> None:
        super().__init__(options, prefix, num_blocks=options.depth + 1)
        self.right_norm, self.below_norm = make_norm(options), make_norm(options)
        self.right_head = nn.Linear(options.dim, options.codebook_size, bias=False)
        self.below_head = nn.Linear(options.dim, options.codebook_size, bias=False)
        self.apply(init_weights)
        nn.init.zeros_(self.right_head.weight)

    @property
    def order(self) -> DiagonalOrder:
        """Anti-diagonals."""
        return DiagonalOrder(self.num_tokens, (self.options.grid_size, self.options.grid_size))

    def logits(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Features before and after the last block `[b n d]` -> what the heads say, `[b n codebook_size]` float32 each."""
        right = self.right_head(self.right_norm(before)).float()
        return right, self.below_head(self.below_norm(after)).float()

    def prefill(self, condition: Any, cache: GridCache) -> Tensor:
        before, after = self.read_condition(condition, cache)
        return merge_heads(*self.logits(before[:, -1:], after[:, -1:]), 0, self.options.grid_size)

    def step(self, indices: Tensor, cache: GridCache) -> Tensor:
        step, expected = self._last_step(cache)
        if indices.shape[1] != expected:
            raise ValueError(f"step {step} decides {expected} tokens, {indices.shape[1]} were fed")
        # What is in the cache was decided before, or with them: they see all of it.
        features = self.read_next(indices, cache, mask=None)
        return merge_heads(*self.logits(*features), step + 1, self.options.grid_size)

    def feed(self, indices: Tensor, cache: GridCache) -> tuple[Tensor, Tensor]:
        depths = torch.arange(indices.shape[1], device=indices.device)
        together = torch.ones_like(depths, dtype=torch.bool).expand(1, len(depths), -1)
        mask = TreeMask(cache.lengths, together)
        return self.logits(*self.read_tree(indices, depths.expand(len(indices), -1), mask, cache))

    def next_logits(self, outputs: tuple[Tensor, ...], step: int) -> Tensor:
        right, below = outputs
        return merge_heads(right, below, step, self.options.grid_size)

    def _last_step(self, cache: GridCache) -> tuple[int, int]:
        """The step whose tokens come next into the cache, and how many they are."""
        num_fed = cache.length - self.prefix.length
        if num_fed < 0:
            raise ValueError("the cache does not hold the condition: prefill goes before the first step")
        for step, size in enumerate(cache.step_sizes[:-1]):  # nothing follows the last one
            if num_fed == 0:
                return step, size
            num_fed -= size
            if num_fed < 0:
                raise ValueError(f"the cache ends within step {step}; roll it back to the end of a step")
        raise ValueError(f"all {self.num_tokens} tokens are decided, nothing follows")

    def forward(self, condition: Any, indices: Tensor) -> Tensor:
        """Training pass: a condition and all tokens of every image `[b n]` -> logits `[b n codebook_size]` float32.

        Logits at a position follow from the condition and the anti-diagonals before its own.

        Raises:
            ValueError: not `num_tokens` tokens, or not one condition per image.
        """
        right, below = self.head_logits(condition, indices)
        order = self.order
        sizes = [len(positions) for positions in order.plan()]
        sources = zip(right.split([1, *sizes], dim=1), below.split([1, *sizes], dim=1), strict=True)
        diagonals = [
            merge_heads(*source, step, self.options.grid_size)
            for step, source in zip(range(order.num_steps), sources, strict=False)  # nothing follows the last
        ]
        return torch.cat(diagonals, dim=1)[:, order.slots()]

    def head_logits(self, condition: Any, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What both heads say at the last position of the condition and then at every token, as they are decided.

        Returns:
            Of the tokens to the right and below, `[b 1+n codebook_size]` float32 each; raises as `forward` does.
        """
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens:
            raise ValueError(f"indices must be [b {self.num_tokens}], got {list(indices.shape)}")
        return self.logits(*self.read_all(condition, indices[:, self.order.sequence()]))


class NARClass(NAR):
    """NAR conditioned on a class.

    Args:
        num_classes: classes to condition on; the label `num_classes` means none.
        codebook_size, num_tokens, dim, ..., mlp_dropout: see `GridOptions`.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        num_tokens: int = 256,
        num_classes: int = 1000,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        mlp_dim: int = 2048,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        mlp_dropout: float = 0.0,
    ) -> None:
        super().__init__(GridOptions.of(self.config), ClassPrefix(num_classes, dim))
        self.num_classes = num_classes


class NARText(NAR):
    """NAR conditioned on a text.

    Args:
        text_dim: width of the text features.
        text_encoder: the encoder whose features it was trained with, a name of the hub.
        max_text_length: positions of a text; shorter ones are padded on the left.
        codebook_size, num_tokens, dim, ..., mlp_dropout: see `GridOptions`.
    """

    prefix: TextPrefix
    clean_text = staticmethod(clean_caption)  # what the texts of its training went through

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        num_tokens: int = 256,
        text_dim: int = 2048,
        text_encoder: str = "google/flan-t5-xl",
        max_text_length: int = 120,
        dim: int = 1280,
        depth: int = 36,
        num_heads: int = 20,
        num_kv_heads: int | None = None,
        mlp_dim: int = 3584,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        mlp_dropout: float = 0.0,
    ) -> None:
        prefix = TextPrefix(text_dim, text_encoder, max_text_length, dim)
        super().__init__(GridOptions.of(self.config), prefix)
