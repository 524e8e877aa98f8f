"""LlamaGen: next-token generators over the grid of a VQ tokenizer (Sun et al. 2024, section 2.2).

A LLaMA decoder (RMSNorm, SwiGLU, no biases; Touvron et al. 2023, section 2.2) reads `[condition, token 1 ... token n]` and
predicts the token that follows. The condition is one class token, or a text as features of a frozen T5 encoder, projected
and padded on the left to a fixed length. Positions are rotary over row and column of the grid; those of a token itself,
not of the one it predicts. At condition positions cosine and sine are both 0, so that their queries and keys vanish:
nobody can tell them apart by their keys, and a condition position averages the values it may see.

`GridTransformer`, all of this but the heads, is shared with NAR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import (
    AttentionMask,
    CausalMask,
    KeyMask,
    OrderMask,
    SelfMask,
    TreeMask,
    attention,
)
from vistok.models.generators.base import NextTokenGenerator, OrderedGenerator, Reading
from vistok.models.generators.caption_cleaning import clean_caption
from vistok.models.generators.text_features import TextFeatures
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.mlp import GatedMLP
from vistok.models.layers.norm import RMSNorm
from vistok.models.layers.rope import Rotation, axial_rope, rotate
from vistok.order import RasterOrder
from vistok.tokens import Layout

PRESETS = {  # published name -> sizes; parameters do not depend on the number of tokens
    "B": {"depth": 12, "dim": 768, "num_heads": 12, "mlp_dim": 2048},
    "L": {"depth": 24, "dim": 1024, "num_heads": 16, "mlp_dim": 2816},
    "XL": {"depth": 36, "dim": 1280, "num_heads": 20, "mlp_dim": 3584},
    "XXL": {"depth": 48, "dim": 1536, "num_heads": 24, "mlp_dim": 4096},
    "XXXL": {
        "depth": 48,
        "dim": 2560,
        "num_heads": 40,
        "mlp_dim": 6912,
    },  # this, 1B and 7B were never released
    "1B": {"depth": 22, "dim": 2048, "num_heads": 32, "mlp_dim": 5632},
    "3B": {"depth": 24, "dim": 3200, "num_heads": 32, "mlp_dim": 8704},
    "7B": {"depth": 32, "dim": 4096, "num_heads": 32, "mlp_dim": 11008},
}
NULL_TEXT_LENGTH = 120  # rows of the stored null caption, however long texts are


@dataclass(frozen=True)
class GridOptions:
    """The sizes of a `GridTransformer`.

    Args:
        codebook_size: image token ids.
        num_tokens: image tokens per image, those of a square grid.
        dim: width.
        depth: blocks in front of the (first) head.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values, each shared by several of queries; `None`: as many.
        mlp_dim: hidden width of the gated MLP.
        norm_eps: of all norms.
        rope_base: of the rotary positions.
        token_dropout: in training, on the whole embedded sequence.
        residual_dropout: in training, on the output of the attention.
        mlp_dropout: in training, on the output of the MLP.

    Raises:
        ValueError: sizes that do not fit each other, or a grid that is not square.
    """

    codebook_size: int
    num_tokens: int
    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int | None
    mlp_dim: int
    norm_eps: float
    rope_base: float
    token_dropout: float
    residual_dropout: float
    mlp_dropout: float

    def __post_init__(self) -> None:
        for name in ("codebook_size", "num_tokens", "depth", "num_heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.grid_size**2 != self.num_tokens:
            raise ValueError(
                f"num_tokens {self.num_tokens} does not make a square grid; "
                f"{self.grid_size**2} and {(self.grid_size + 1) ** 2} do"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 4:
            raise ValueError(
                f"positions over rows and columns need heads of a multiple of 4 channels, dim {self.dim} and "
                f"num_heads {self.num_heads} make them {self.head_dim} wide"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> GridOptions:
        """Those among the arguments of a model's constructor, as its configuration records them."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the grid."""
        return math.isqrt(self.num_tokens)

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class GridCache(KVCache):
    """The state of one batch. Slots are filled as the order decides positions, after the condition.

    Args:
        rope: of all slots.
        step_sizes: how many tokens the order decides at each step.
        sizes: see `KVCache`.
    """

    def __init__(self, *, rope: Rotation, step_sizes: list[int], **sizes: Any) -> None:
        super().__init__(**sizes)
        self.rope = rope
        self.step_sizes = step_sizes
        self.keep: Tensor | None = None  # [b max_length], False on the padding of a text; prefill sets it

    def tensors(self) -> list[Tensor]:
        """See `KVCache`."""
        return [*super().tensors(), *([] if self.keep is None else [self.keep])]

    def narrow(self, batch_size: int) -> GridCache:
        """See `KVCache.narrow`."""
        view = super().narrow(batch_size)
        assert isinstance(view, GridCache)
        view.keep = None if self.keep is None else self.keep[:batch_size]
        return view

    def put_rows(self, slots: Tensor, source: KVCache, rows: Tensor) -> None:
        """See `KVCache.put_rows`."""
        super().put_rows(slots, source, rows)
        assert isinstance(source, GridCache)
        if source.keep is None:
            return
        if self.keep is None:
            self.keep = source.keep.new_ones(self.batch_size, self.max_length)
        self.keep[slots, : source.max_length] = source.keep[rows]


class GridTransformer(OrderedGenerator):
    """Condition and tokens in, features out; `step` and the heads are those of a family.

    Args:
        options: sizes.
        prefix: what turns conditions into the first positions of a sequence.
        num_blocks: transformer blocks.
    """

    _supports_gradient_checkpointing = False

    def __init__(self, options: GridOptions, prefix: ClassPrefix | TextPrefix, *, num_blocks: int) -> None:
        super().__init__()
        self.options = options
        self.codebook_size = options.codebook_size
        self.num_tokens = options.num_tokens
        self.layout = Layout((options.grid_size, options.grid_size))
        self.prefix = prefix
        self.token_embed = nn.Embedding(options.codebook_size, options.dim)
        self.embed_dropout = nn.Dropout(options.token_dropout)
        self.blocks = nn.ModuleList(GridBlock(options) for _ in range(num_blocks))

    def null_condition(self, batch_size: int) -> Any:
        return self.prefix.null(batch_size)

    def null_condition_for(self, condition: Any) -> Any:
        """As `null_condition`; for a text, as long as each text is, whose padding the release also uses for it."""
        return self.prefix.null_like(condition)

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> GridCache:
        return GridCache(
            rope=self.rope(),
            step_sizes=self.order.decided_at().bincount().tolist(),
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.options.kv_heads,
            max_length=self.prefix.length + (num_tokens or self.num_tokens),
            head_dim=self.options.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def rope(self) -> Rotation:
        """Rotary factors of the whole sequence, the condition and the tokens as they are decided."""
        coordinates = self.layout.coordinates(self.num_tokens)[self.order.sequence()].to(self.device)
        cos, sin = axial_rope(coordinates, self.options.head_dim, self.options.rope_base)
        above = (0, 0, self.prefix.length, 0)
        return F.pad(cos, above), F.pad(sin, above)

    def mask(
        self, keep: Tensor | None, num_positions: int, padding: AttentionMask | None = None
    ) -> AttentionMask:
        """Who sees whom among the first `num_positions` of a sequence.

        Args:
            keep: `[b t]`, the positions of the condition that are no padding; `None`: all.
            num_positions: the condition and some tokens, as they are decided.
            padding: what padding sees, which nobody else sees; itself by default, so that its softmax is defined.
        """
        if keep is None and isinstance(self.order, RasterOrder):
            return CausalMask()
        length = self.prefix.length
        ranks = torch.cat([torch.arange(-length, 0), self.order.decided_at().sort().values])[:num_positions]
        ranks = ranks.to(self.device)
        ordered = OrderMask(ranks, ranks)
        if keep is None:
            return ordered
        no_padding = KeyMask(F.pad(keep, (0, num_positions - length), value=True))
        return ordered & no_padding | (padding or SelfMask())

    def trunk(
        self, hidden_states: Tensor, rope: Rotation, mask: AttentionMask | None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """All blocks: `[b n d]` -> the residual stream before the last block and after it, `[b n d]` each."""
        before = hidden_states
        for i, block in enumerate(self.blocks):
            before = hidden_states
            hidden_states = block(before, rope, mask, cache.layers[i] if cache is not None else None)
        return before, hidden_states

    def read_all(self, condition: Any, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Training pass over a condition and the tokens `[b k]` that are decided first, in that order.

        Returns:
            What `trunk` returns from the last position of the condition on, `[b 1+k d]` each.
        """
        prefix, keep = self.prefix(condition)
        if len(prefix) != len(indices):
            raise ValueError(f"{len(prefix)} conditions came with the tokens of {len(indices)} images")
        hidden_states = torch.cat([prefix, self.token_embed(indices)], dim=1)
        mask = self.mask(keep, hidden_states.shape[1])
        rope = _part(self.rope(), 0, hidden_states.shape[1])
        before, after = self.trunk(self.embed_dropout(hidden_states), rope, mask)
        first = self.prefix.length - 1
        return before[:, first:], after[:, first:]

    def read_condition(self, condition: Any, cache: GridCache) -> tuple[Tensor, Tensor]:
        """Feed a condition; returns what `trunk` does at its positions, `[b t d]` each."""
        prefix, keep = self.prefix(condition)
        length = self.prefix.length
        cache.keep = None if keep is None else F.pad(keep, (0, cache.max_length - length), value=True)
        padding = None if keep is None else CaptionPadding(keep, sees_text=self.dtype == torch.float32)
        mask = self.mask(keep, length, padding)
        return self.trunk(prefix, _part(cache.rope, 0, length), mask, cache)

    def read_next(
        self, indices: Tensor, cache: GridCache, mask: AttentionMask | None
    ) -> tuple[Tensor, Tensor]:
        """Feed the tokens `[b k]` that were decided last; returns what `trunk` does at them, `[b k d]` each.

        Args:
            indices: `[b k]` int64.
            cache: holds everything before.
            mask: of the new positions; padding is taken care of here.

        Raises:
            ValueError: they do not fit into the cache, or are more than an image has.
        """
        first, last = cache.length, cache.length + indices.shape[1]
        if first < self.prefix.length:
            raise ValueError("the cache does not hold the condition: prefill goes before the first step")
        most = min(cache.max_length, self.prefix.length + self.num_tokens)
        if last > most:
            raise ValueError(f"the cache holds {most} positions, {last} were asked for")
        if cache.keep is not None:
            keys = KeyMask(cache.keep[:, :last])
            mask = keys if mask is None else mask & keys
        return self.trunk(self.token_embed(indices), _part(cache.rope, first, last), mask, cache)

    def read_tree(
        self, indices: Tensor, depths: Tensor, tree: TreeMask, cache: GridCache
    ) -> tuple[Tensor, Tensor]:
        """Feed nodes `[r t]` of a tree; returns what `trunk` does at them, `[r t d]` each."""
        places = cache.node_places(depths).clamp(max=self.prefix.length + self.num_tokens - 1)  # [r t]
        cos, sin = (factors[places][:, None] for factors in cache.rope)  # [r 1 t d/2]
        mask = tree if cache.keep is None else replace(tree, keep=cache.keep)
        return self.trunk(self.token_embed(indices), (cos, sin), mask, cache)


@dataclass(frozen=True)
class CaptionPadding(AttentionMask):
    """What the padding on the left of a text attends to. Nobody attends to it, but drafters read what is made of it.

    As in the released speculative decoder (Jang et al. 2025, LANTERN), which adds a causal mask and one of the padding:
    padding sees the padding up to itself. Where the sum of both does not overflow to minus infinity, in float32, a
    pair that only one of them forbids is no worse than all others of its row, and padding sees the text as well.

    Args:
        keep: `[b n]`, False on the padding.
        sees_text: as in float32.
    """

    keep: Tensor
    sees_text: bool

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        if not num_queries == num_keys == self.keep.shape[1]:
            raise ValueError(
                f"CaptionPadding covers {self.keep.shape[1]} positions, "
                f"the attention has {num_queries} queries and {num_keys} keys"
            )
        keep = self.keep.to(device)
        key = torch.arange(num_keys, device=device)
        seen = ~keep[:, None] & (key <= key[:, None])  # [b q k], the padding so far
        if self.sees_text:
            seen = seen | (keep[:, None] & (key > key[:, None]))
        return (seen & ~keep[:, :, None])[:, None]  # [b 1 q k]


def _part(rope: Rotation, first: int, last: int) -> Rotation:
    cos, sin = rope
    return cos[first:last], sin[first:last]


class GridBlock(nn.Module):
    """Self-attention and gated MLP, each on the RMS-normalised stream and added to it."""

    def __init__(self, options: GridOptions) -> None:
        super().__init__()
        self.norm1 = make_norm(options)
        self.attn = GridAttention(options)
        self.attn_dropout = nn.Dropout(options.residual_dropout)
        self.norm2 = make_norm(options)
        self.mlp = GatedMLP(options.dim, options.mlp_dim)
        self.mlp_dropout = nn.Dropout(options.mlp_dropout)

    def forward(
        self, hidden_states: Tensor, rope: Rotation, mask: AttentionMask | None, cache: LayerCache | None
    ) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        seen = self.attn(self.norm1(hidden_states), rope, mask, cache)
        hidden_states = hidden_states + self.attn_dropout(seen)
        return hidden_states + self.mlp_dropout(self.mlp(self.norm2(hidden_states)))


class GridAttention(nn.Module):
    """Self-attention with rotary positions; several heads of queries may share one of keys and values."""

    def __init__(self, options: GridOptions) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        self.heads = [options.num_heads, options.kv_heads, options.kv_heads]  # of queries, keys and values
        self.qkv = nn.Linear(options.dim, sum(self.heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(options.dim, options.dim, bias=False)

    def forward(
        self, hidden_states: Tensor, rope: Rotation, mask: AttentionMask | None, cache: LayerCache | None
    ) -> Tensor:
        """`[b n d]` -> `[b n d]`; with a cache, the keys are all that were appended so far."""
        qkv = rearrange(self.qkv(hidden_states), "b n (h d) -> b h n d", d=self.head_dim)
        q, k, v = qkv.split(self.heads, dim=1)  # [b h n d] each
        if cache is not None:
            seen = cache.attend(q, k, v, mask, rope)
        else:
            seen = attention(rotate(q, *rope), rotate(k, *rope), v, mask)
        return self.proj(rearrange(seen, "b h n d -> b n (h d)"))


class ClassPrefix(nn.Module):
    """A class as one position; the row after the classes means "no class"."""

    length = 1

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Embedding(num_classes + 1, dim)

    def forward(self, class_labels: Tensor) -> tuple[Tensor, None]:
        """`[b]` int64 -> `[b 1 d]`, and `None`: nothing is padding.

        Raises:
            ValueError: a label is out of range.
        """
        if (
            class_labels.numel()
            and not 0 <= int(class_labels.min()) <= int(class_labels.max()) <= self.num_classes
        ):
            raise ValueError(
                f"class labels must be in 0..{self.num_classes - 1}, or {self.num_classes} for none; "
                f"got {class_labels.tolist()}"
            )
        return self.embed(class_labels)[:, None], None

    def null(self, batch_size: int) -> Tensor:
        """ "No class", `[b]`."""
        return torch.full((batch_size,), self.num_classes, dtype=torch.int64)

    def null_like(self, class_labels: Tensor) -> Tensor:
        """As `null`, one for each of `class_labels [b]`."""
        return torch.full_like(class_labels, self.num_classes)


class TextPrefix(nn.Module):
    """A text, as features of a frozen encoder, as `length` positions with the padding on the left.

    The null text, which stands for no text in guidance, is as random as it was when training began.
    """

    def __init__(self, text_dim: int, text_encoder: str, length: int, dim: int) -> None:
        super().__init__()
        if not 1 <= length <= NULL_TEXT_LENGTH:
            raise ValueError(f"max_text_length must be in 1..{NULL_TEXT_LENGTH}, got {length}")
        self.text_dim = text_dim
        self.text_encoder = text_encoder
        self.length = length
        self.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.null_text: Tensor
        self.register_buffer("null_text", torch.randn(NULL_TEXT_LENGTH, text_dim) / text_dim**0.5)

    def forward(self, text: TextFeatures) -> tuple[Tensor, Tensor]:
        """Texts -> `[b length d]`, and which positions are no padding `[b length]`.

        Raises:
            ValueError: the features are not `text_dim` wide, or a text is too long.
        """
        if text.features.shape[2] != self.text_dim:
            raise ValueError(
                f"text features are {text.features.shape[2]} wide, this model reads {self.text_dim}: "
                f"those of {self.text_encoder}"
            )
        weight = self.fc1.weight
        text = text.to(weight.device).left_padded(self.length)
        hidden_states = F.gelu(self.fc1(text.features.to(weight.dtype)), approximate="tanh")
        return self.fc2(hidden_states), text.keep

    def null(self, batch_size: int) -> TextFeatures:
        """The null text at full length."""
        features = self.null_text[: self.length].expand(batch_size, -1, -1)
        return TextFeatures(features, features.new_ones(features.shape[:2], dtype=torch.bool))

    def null_like(self, text: TextFeatures) -> TextFeatures:
        """The null text, of which each row keeps the positions that a row of `text` has."""
        keep = text.left_padded(self.length).keep
        return TextFeatures(self.null(len(text)).features.to(keep.device), keep)


class LlamaGen(GridTransformer, NextTokenGenerator):  # type: ignore[misc]  # as for Generator
    """What both kinds of conditioning share: next token, one head."""

    def __init__(self, options: GridOptions, prefix: ClassPrefix | TextPrefix) -> None:
        super().__init__(options, prefix, num_blocks=options.depth)
        self.norm = make_norm(options)
        self.head = nn.Linear(options.dim, options.codebook_size, bias=False)
        self.apply(init_weights)
        nn.init.zeros_(self.head.weight)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """`[b n d]` -> `[b n codebook_size]` float32."""
        return self.head(self.norm(hidden_states)).float()

    def features_to_logits(self, features: Tensor) -> Tensor:
        """`[r n d]` -> `[r n v]` float32."""
        return self.head(features).float()

    def embed_tokens(self, indices: Tensor) -> Tensor:
        return self.token_embed(indices)

    def read_prefix(self, condition: Any, cache: GridCache) -> Reading:
        features = self.norm(self.read_condition(condition, cache)[1])
        return Reading(features, self.features_to_logits(features[:, -1:]))

    def read_nodes(self, indices: Tensor, depths: Tensor, mask: TreeMask, cache: GridCache) -> Reading:
        features = self.norm(self.read_tree(indices, depths, mask, cache)[1])
        return Reading(features, self.features_to_logits(features))

    def step(self, indices: Tensor, cache: GridCache) -> Tensor:
        mask = CausalMask() if indices.shape[1] > 1 else None
        return self.logits(self.read_next(indices, cache, mask)[1])

    def forward(self, condition: Any, indices: Tensor) -> Tensor:
        """Training pass: a condition and the first tokens of every image `[b n]` -> logits `[b n codebook_size]` float32.

        Logits at a position follow from the condition and the tokens before it.

        Raises:
            ValueError: not 1 to `num_tokens` tokens, or not one condition per image.
        """
        if indices.ndim != 2 or not 1 <= indices.shape[1] <= self.num_tokens:
            raise ValueError(
                f"indices must be [b n] with n in 1..{self.num_tokens}, got {list(indices.shape)}"
            )
        return self.logits(self.read_all(condition, indices[:, :-1])[1])


class LlamaGenClass(LlamaGen):
    """LlamaGen conditioned on a class.

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


class LlamaGenText(LlamaGen):
    """LlamaGen conditioned on a text.

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


def make_norm(options: GridOptions) -> RMSNorm:
    """A norm over the width."""
    return RMSNorm(options.dim, options.norm_eps, weight_after_cast=True)


def init_weights(module: nn.Module) -> None:
    """As released: normal with deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
