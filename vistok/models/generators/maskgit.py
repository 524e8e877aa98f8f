"""MaskGIT: class-conditional masked generators (Chang et al. 2022), in the two shapes released for 1D tokenizers.

`MaskGITBert` is the post-norm encoder of BERT (Devlin et al. 2019), used with TiTok L-32 and B-64 (Yu et al. 2024) and
with One-D-Piece (Miwa et al. 2025). `MaskGITUViT` is the pre-norm transformer with long skip connections of U-ViT (Bao
et al. 2023), used with TiTok S-128. Both read `[class, token 1 ... token n]`, where undecided tokens carry the mask id,
and predict a code for every position at once; `vistok.decoding.masked` decides which predictions to keep.

Embedding rows: codes 0 .. N-1, mask N, classes N+1 .. N+num_classes, and last "no class".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import attention
from vistok.models.generators.base import MaskedGenerator
from vistok.models.layers.blocks import PreNormBlock
from vistok.models.layers.context_cache import ContextCache, ContextLayer, Evaluation
from vistok.models.layers.layer_cache import LayerCache
from vistok.tokens import Layout


class MaskGIT(MaskedGenerator):
    """What both architectures share: the sizes, and how a class and the tokens become one sequence."""

    _supports_gradient_checkpointing = False

    def __init__(
        self,
        *,
        codebook_size: int,
        num_classes: int,
        num_tokens: int,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("codebook_size", codebook_size), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.codebook_size = codebook_size
        self.num_classes = num_classes
        self.num_tokens = num_tokens
        if grid is not None and math.prod(grid) != num_tokens:
            raise ValueError(f"a grid of {list(grid)} does not have {num_tokens} positions")
        self.layout = Layout(None if grid is None else tuple(grid))

    @property
    def num_embeddings(self) -> int:
        """Codes, mask, classes and "no class"."""
        return self.codebook_size + 1 + self.num_classes + 1

    def input_ids(self, indices: Tensor, class_labels: Tensor) -> Tensor:
        """`[b n]` and `[b]` -> embedding rows `[b 1+n]`, the class first.

        Raises:
            ValueError: not `num_tokens` tokens per image, or not one label per image.
        """
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens:
            raise ValueError(
                f"{type(self).__name__} takes indices [b {self.num_tokens}], got {list(indices.shape)}"
            )
        if class_labels.shape != indices.shape[:1]:
            raise ValueError(f"class_labels must be [{len(indices)}], got {list(class_labels.shape)}")
        return torch.cat([class_labels[:, None] + self.mask_token_id + 1, indices], dim=1)

    def new_cache(self, batch_size: int) -> ContextCache:
        """See `MaskedGenerator.new_cache`."""
        num_heads = self.config["num_heads"]
        return ContextCache(
            depth=self.num_blocks,
            batch_size=batch_size,
            num_heads=num_heads,
            num_tokens=self.num_tokens,
            head_dim=self.config["dim"] // num_heads,
            dtype=self.dtype,
            device=self.device,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks with an attention, each of which has keys and values of its own."""
        raise NotImplementedError(f"{type(self).__name__} does not define num_blocks")

    def layers(self, evaluation: Evaluation | None) -> list[ContextLayer | None]:
        """For every block the keys and values that it brings up to date, if any."""
        return [None] * self.num_blocks if evaluation is None else [*evaluation.layers]


class MaskGITBert(MaskGIT):
    """The BERT-style generator ("ViT" in the releases): post-norm, LayerNorm eps 1e-12, exact GELU.

    Args:
        codebook_size: codes of the tokenizer.
        num_classes: classes to condition on.
        num_tokens: tokens per image.
        grid: their rows and columns, for the tokens of a grid; `None` for a sequence.
        dim: transformer width.
        depth: layers.
        num_heads: attention heads.
        mlp_dim: width of the hidden MLP layer.
        dropout: while training, on the embeddings and on the output of every sublayer.
        attention_dropout: while training, on the attention weights.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        num_classes: int = 1000,
        num_tokens: int = 32,
        grid: Sequence[int] | None = None,
        dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        mlp_dim: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size, num_classes=num_classes, num_tokens=num_tokens, grid=grid
        )
        self.token_embed = nn.Embedding(self.num_embeddings, dim)
        self.position_embed = nn.Embedding(1 + num_tokens, dim)
        # BERT's sentence A/B embedding: there is one segment, so row 0 is always added and row 1 only stored.
        self.segment_embed = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(dim, num_heads, mlp_dim, dropout, attention_dropout) for _ in range(depth)
        )
        self.head = nn.Linear(dim, codebook_size)
        self.apply(_init_normal)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def forward(self, indices: Tensor, class_labels: Tensor, evaluation: Evaluation | None = None) -> Tensor:
        """See `MaskedGenerator.forward`."""
        hidden_states = self.token_embed(self.input_ids(indices, class_labels))  # [b 1+n d]
        hidden_states = hidden_states + self.segment_embed.weight[0] + self.position_embed.weight
        if evaluation is not None:
            hidden_states = evaluation.select(hidden_states)  # [b 1+k d]
        hidden_states = self.embed_dropout(self.norm(hidden_states))
        for block, layer in zip(self.blocks, self.layers(evaluation), strict=True):
            hidden_states = block(hidden_states, layer)
        return self.head(hidden_states[:, 1:])


class PostNormBlock(nn.Module):
    """`x = norm1(x + attention(x))`, then `x = norm2(x + mlp(x))`, as in Vaswani et al. 2017."""

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.attn = DropoutAttention(dim, num_heads, attention_dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`[b n d]` -> `[b n d]`; with a cache, see `DropoutAttention`."""
        hidden_states = self.norm1(hidden_states + self.dropout(self.attn(hidden_states, cache)))
        mlp = self.fc2(F.gelu(self.fc1(hidden_states)))
        return self.norm2(hidden_states + self.dropout(mlp))


class DropoutAttention(nn.Module):
    """Bidirectional self-attention with separate q, k, v projections; attention weights are dropped in training."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`[b n d]` -> `[b n d]`; with a cache, the keys are all that it gives back for the new ones."""
        q, k, v = (
            rearrange(projection(hidden_states), "b n (h d) -> b h n d", h=self.num_heads)
            for projection in (self.query, self.key, self.value)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        if self.training and self.dropout > 0:
            hidden_states = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        else:
            hidden_states = attention(q, k, v)
        return self.proj(rearrange(hidden_states, "b h n d -> b n (h d)"))


class MaskGITUViT(MaskGIT):
    """The U-ViT generator: `depth / 2` blocks in, one in the middle, `depth / 2` out, joined by long skips.

    Attention runs in float32 whatever the dtype around it is.

    Args:
        codebook_size: codes of the tokenizer.
        num_classes: classes to condition on.
        num_tokens: tokens per image.
        grid: their rows and columns, for the tokens of a grid; `None` for a sequence.
        dim: transformer width.
        depth: blocks without the middle one; even.
        num_heads: attention heads.
        mlp_dim: width of the hidden MLP layer.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        num_classes: int = 1000,
        num_tokens: int = 128,
        grid: Sequence[int] | None = None,
        dim: int = 1024,
        depth: int = 20,
        num_heads: int = 16,
        mlp_dim: int = 4096,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size, num_classes=num_classes, num_tokens=num_tokens, grid=grid
        )
        if depth % 2:
            raise ValueError(f"depth counts pairs of in- and out-blocks and must be even, got {depth}")
        self.token_embed = nn.Embedding(self.num_embeddings, dim)
        self.position_embed = nn.Parameter(torch.empty(1, 1 + num_tokens, dim))
        self.in_blocks = nn.ModuleList(_uvit_block(dim, num_heads, mlp_dim) for _ in range(depth // 2))
        self.mid_block = _uvit_block(dim, num_heads, mlp_dim)
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))
        self.out_blocks = nn.ModuleList(_uvit_block(dim, num_heads, mlp_dim) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, codebook_size)
        nn.init.trunc_normal_(self.position_embed, std=0.02)
        self.apply(_init_truncated_normal)

    @property
    def num_blocks(self) -> int:
        return len(self.in_blocks) + 1 + len(self.out_blocks)

    def forward(self, indices: Tensor, class_labels: Tensor, evaluation: Evaluation | None = None) -> Tensor:
        """See `MaskedGenerator.forward`."""
        hidden_states = self.token_embed(self.input_ids(indices, class_labels))  # [b 1+n d]
        hidden_states = hidden_states + self.position_embed
        if evaluation is not None:
            hidden_states = evaluation.select(hidden_states)  # [b 1+k d]
        layers = iter(self.layers(evaluation))
        kept: list[Tensor] = []
        for block in self.in_blocks:
            hidden_states = block(hidden_states, cache=next(layers))
            kept.append(hidden_states)
        hidden_states = self.mid_block(hidden_states, cache=next(layers))
        for skip, block in zip(self.skips, self.out_blocks, strict=True):
            hidden_states = torch.cat([hidden_states, kept.pop()], dim=-1)
            hidden_states = block(skip(hidden_states), cache=next(layers))
        return self.head(self.norm(hidden_states[:, 1:]))


def _uvit_block(dim: int, num_heads: int, mlp_dim: int) -> PreNormBlock:
    return PreNormBlock(dim, num_heads, mlp_dim, qkv_bias=False, float32_attention=True)


def _init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _init_truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


PRESETS: dict[str, tuple[type[MaskGIT], dict[str, int]]] = {
    "maskgit-titok-l-32": (MaskGITBert, {"num_tokens": 32}),
    "maskgit-titok-b-64": (MaskGITBert, {"num_tokens": 64}),
    "maskgit-titok-s-128": (MaskGITUViT, {"num_tokens": 128}),
    "maskgit-one-d-piece-s-256": (MaskGITBert, {"num_tokens": 256}),
    "maskgit-one-d-piece-b-256": (MaskGITBert, {"num_tokens": 256}),
    "maskgit-one-d-piece-l-256": (MaskGITBert, {"num_tokens": 256}),
}
