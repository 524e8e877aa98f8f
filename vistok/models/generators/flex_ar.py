"""FlexAR: next-token generators over FlexTok's tokens, conditioned on a class or on a text.

Bachmann et al. 2025 (FlexTok), section 4.2, and the released text-to-image models of the same lab. A LLaMA-style decoder
(RMSNorm, SwiGLU; Touvron et al. 2023, section 2.2) without rotary positions reads `[start, token 1 ... token n-1]`, each
with a position added; position i predicts token i. A class is one vector added to the start. A text, as the features
of a frozen T5 encoder, is projected once and read by a cross-attention in every block.

The tokens are ordered coarse to fine, so generation can stop after any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, CausalMask, KeyMask, TreeMask, attention
from vistok.models.generators.base import NextTokenGenerator, Reading
from vistok.models.generators.text_features import TextFeatures
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.mlp import GatedMLP
from vistok.models.layers.norm import RMSNorm

NO_CLASS = -1  # as released: the label of the unconditional branch, whose class vector is zero


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of one model have in common.

    Args:
        dim: width.
        num_heads: attention heads.
        mlp_dim: hidden width of the gated MLP.
        norm: `"rms"` or `"layer"`, with a weight, the latter also with a bias.
        norm_eps: of these norms.
        qk_norm: norm of queries and keys per head, of the same kinds; `None` for none.
        qk_norm_eps: of that norm.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        bias: whether the other linear layers of a block have one.

    Raises:
        ValueError: an unknown norm, or `dim` is not a multiple of `num_heads`.
    """

    dim: int
    num_heads: int
    mlp_dim: int
    norm: str
    norm_eps: float
    qk_norm: str | None
    qk_norm_eps: float
    qkv_bias: bool
    bias: bool

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        for kind in (self.norm, self.qk_norm):
            if kind not in ("rms", "layer", None):
                raise ValueError(f"a norm is 'rms' or 'layer', got {kind!r}")

    def make_norm(self) -> nn.Module:
        """A norm over the width."""
        return _norm(self.norm, self.dim, self.norm_eps)

    def make_head_norm(self) -> nn.Module:
        """A norm over one head's queries or keys."""
        if self.qk_norm is None:
            return nn.Identity()
        return _norm(self.qk_norm, self.dim // self.num_heads, self.qk_norm_eps)


def _norm(kind: str, dim: int, eps: float) -> nn.Module:
    return RMSNorm(dim, eps) if kind == "rms" else nn.LayerNorm(dim, eps)


class FlexARCache(KVCache):
    """The state of one batch: self-attention's keys and values, and those of the text, which `prefill` puts there."""

    text: list[TextKeys] | None = None

    def tensors(self) -> list[Tensor]:
        """See `KVCache`."""
        return [
            *super().tensors(),
            *(x for text in self.text or [] for x in (text.keys, text.values, text.keep)),
        ]

    def narrow(self, batch_size: int) -> FlexARCache:
        """See `KVCache.narrow`."""
        view = super().narrow(batch_size)
        assert isinstance(view, FlexARCache)
        view.text = None if self.text is None else [keys.narrow(batch_size) for keys in self.text]
        return view

    def put_rows(self, slots: Tensor, source: KVCache, rows: Tensor) -> None:
        """See `KVCache.put_rows`; texts are padded to the longest that was ever put there."""
        super().put_rows(slots, source, rows)
        assert isinstance(source, FlexARCache)
        if source.text is None:
            return
        if self.text is None:
            self.text = [keys.blank(self.batch_size) for keys in source.text]
        self.text = [
            mine.put_rows(slots, keys, rows) for mine, keys in zip(self.text, source.text, strict=True)
        ]


@dataclass(frozen=True)
class TextKeys:
    """What the cross-attention of one block reads: `keys` and `values [b h s d]`, `keep [b s]`."""

    keys: Tensor
    values: Tensor
    keep: Tensor

    def narrow(self, batch_size: int) -> TextKeys:
        """Those of the first rows."""
        return TextKeys(self.keys[:batch_size], self.values[:batch_size], self.keep[:batch_size])

    def blank(self, batch_size: int) -> TextKeys:
        """Of so many rows that hold nothing, as long as these."""
        parts = (self.keys, self.values, self.keep)
        return TextKeys(*(part.new_zeros(batch_size, *part.shape[1:]) for part in parts))

    def put_rows(self, slots: Tensor, source: TextKeys, rows: Tensor) -> TextKeys:
        """These with other texts in the rows `slots`: in place, unless the others are longer."""
        length = max(self.keep.shape[1], source.keep.shape[1])
        mine, new = self._padded(length), source._padded(length)
        for stored, other in ((mine.keys, new.keys), (mine.values, new.values), (mine.keep, new.keep)):
            stored[slots] = other[rows]
        return mine

    def _padded(self, length: int) -> TextKeys:
        more = length - self.keep.shape[1]
        if not more:
            return self
        keys, values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        return TextKeys(keys, values, F.pad(self.keep, (0, more)))


class FlexAR(NextTokenGenerator):
    """What both kinds of conditioning share: tokens in, blocks, logits out."""

    _supports_gradient_checkpointing = False

    def __init__(
        self,
        options: BlockOptions,
        *,
        codebook_size: int,
        num_tokens: int,
        depth: int,
        final_norm: bool,
        reads_text: bool,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or num_tokens < 1:
            raise ValueError(f"codebook_size {codebook_size} and num_tokens {num_tokens} must be at least 1")
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.token_embed = nn.Embedding(codebook_size, options.dim)
        self.start_embed = nn.Parameter(torch.randn(1, 1, options.dim) * 0.02)
        self.position_embed = nn.Parameter(torch.randn(num_tokens, options.dim) * 0.02)
        self.blocks = nn.ModuleList(FlexARBlock(options, reads_text) for _ in range(depth))
        self.out_norm = options.make_norm() if final_norm else nn.Identity()
        self.head = nn.Linear(options.dim, codebook_size, bias=False)
        self.apply(_init_weights)

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> FlexARCache:
        heads, dim = self.config["num_heads"], self.config["dim"]
        return FlexARCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=heads,
            max_length=num_tokens or self.num_tokens,
            head_dim=dim // heads,
            dtype=self.dtype,
            device=self.device,
        )

    def step(self, indices: Tensor, cache: FlexARCache) -> Tensor:
        first, num_fed = cache.length, indices.shape[1]
        embedded = self.token_embed(indices) + self.position_embed[first : first + num_fed]  # [b k d]
        return self.head(self.trunk(embedded, cache.text, cache))

    def read_nodes(self, indices: Tensor, depths: Tensor, mask: TreeMask, cache: FlexARCache) -> Reading:
        places = cache.node_places(depths).clamp(max=self.num_tokens - 1)  # [r t]
        embedded = self.token_embed(indices) + self.position_embed[places]
        features = self.trunk(embedded, cache.text, cache, mask)
        return Reading(features, self.head(features))

    def features_to_logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def embed_tokens(self, indices: Tensor) -> Tensor:
        return self.token_embed(indices)

    def embed(self, indices: Tensor) -> Tensor:
        """`[start, tokens but the last]` with positions: `indices [b n]` -> `[b n d]`.

        Raises:
            ValueError: not 1 to `num_tokens` tokens.
        """
        if indices.ndim != 2 or not 1 <= indices.shape[1] <= self.num_tokens:
            raise ValueError(
                f"indices must be [b n] with n in 1..{self.num_tokens}, got {list(indices.shape)}"
            )
        start = self.start_embed.expand(len(indices), -1, -1)
        embedded = torch.cat([start, self.token_embed(indices[:, :-1])], dim=1)  # [b n d]
        return embedded + self.position_embed[: indices.shape[1]]

    def trunk(
        self,
        hidden_states: Tensor,
        text: list[TextKeys] | None = None,
        cache: FlexARCache | None = None,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """All blocks, causal unless another mask is given, and the last norm: `[b n d]` -> `[b n d]`."""
        mask = mask or CausalMask()
        for i, block in enumerate(self.blocks):
            layer_cache = cache.layers[i] if cache is not None else None
            hidden_states = block(hidden_states, text[i] if text is not None else None, mask, layer_cache)
        return self.out_norm(hidden_states)


class FlexARClass(FlexAR):
    """FlexAR conditioned on a class.

    Args:
        codebook_size: image token ids.
        num_tokens: image tokens per image.
        num_classes: classes to condition on.
        dim, num_heads, mlp_dim, norm, norm_eps, qk_norm, qk_norm_eps, qkv_bias, bias: see `BlockOptions`.
        depth: transformer blocks.
        final_norm: a norm after the last block.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 64000,
        num_tokens: int = 256,
        num_classes: int = 1000,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 2048,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        bias: bool = False,
        final_norm: bool = True,
    ) -> None:
        options = BlockOptions(dim, num_heads, mlp_dim, norm, norm_eps, qk_norm, qk_norm_eps, qkv_bias, bias)
        super().__init__(
            options,
            codebook_size=codebook_size,
            num_tokens=num_tokens,
            depth=depth,
            final_norm=final_norm,
            reads_text=False,
        )
        self.num_classes = num_classes
        self.class_embed = nn.Embedding(num_classes, dim)
        _init_weights(self.class_embed)

    def null_condition(self, batch_size: int) -> Tensor:
        return torch.full((batch_size,), NO_CLASS, dtype=torch.int64)

    def embed_class(self, class_labels: Tensor) -> Tensor:
        """`[b]` int64, classes or `NO_CLASS` -> `[b d]`.

        Raises:
            ValueError: a label is out of range.
        """
        if class_labels.numel() and not (
            int(class_labels.min()) >= NO_CLASS and int(class_labels.max()) < self.num_classes
        ):
            raise ValueError(
                f"class labels must be in 0..{self.num_classes - 1}, or {NO_CLASS} for none; got {class_labels.tolist()}"
            )
        vectors = self.class_embed(class_labels.clamp(min=0))
        return vectors.masked_fill((class_labels == NO_CLASS)[:, None], 0.0)

    def read_prefix(self, condition: Tensor, cache: FlexARCache) -> Reading:
        """Feed the start and the class `[b]`."""
        start = self.start_embed[0] + self.position_embed[:1] + self.embed_class(condition)  # [b d]
        features = self.trunk(start[:, None], None, cache)  # [b 1 d]
        return Reading(features, self.head(features))

    def embed_all(self, condition: Tensor, indices: Tensor) -> Tensor:
        """As `embed`, with the class `[b]` added to the start."""
        embedded = self.embed(indices)
        class_vector = F.pad(self.embed_class(condition)[:, None], (0, 0, 0, indices.shape[1] - 1))
        return embedded + class_vector

    def forward(self, condition: Tensor, indices: Tensor) -> Tensor:
        """Training pass: classes `[b]` and the tokens seen so far `[b n]` -> logits `[b n codebook_size]`.

        Logits at a position follow from the class and the tokens before it.
        """
        return self.head(self.trunk(self.embed_all(condition, indices)))


class FlexARText(FlexAR):
    """FlexAR conditioned on a text.

    Args:
        codebook_size, num_tokens, dim, ..., final_norm: see `FlexARClass`.
        text_dim: width of the text features.
        text_gelu: which GELU the projection of the features has: `"tanh"` or `"none"` (exact).
        text_encoder: the encoder whose features it was trained with, a name of the hub.
        max_text_length: the encoder's tokens per text in training; longer texts were cut. `None`: its own limit.
    """

    null_prompt = ""  # guidance leads away from the features of this text

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 64000,
        num_tokens: int = 256,
        text_dim: int = 2048,
        text_gelu: str = "tanh",
        text_encoder: str = "google/flan-t5-xl",
        max_text_length: int | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 2048,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        bias: bool = False,
        final_norm: bool = True,
    ) -> None:
        options = BlockOptions(dim, num_heads, mlp_dim, norm, norm_eps, qk_norm, qk_norm_eps, qkv_bias, bias)
        super().__init__(
            options,
            codebook_size=codebook_size,
            num_tokens=num_tokens,
            depth=depth,
            final_norm=final_norm,
            reads_text=True,
        )
        self.text_dim = text_dim
        self.text_proj = TextProjection(text_dim, dim, text_gelu)
        self.text_proj.apply(_init_weights)

    def null_condition(self, batch_size: int) -> TextFeatures:
        raise ValueError(
            "guidance needs the features of the empty text: pass null_condition, or use a guidance scale of 1.0"
        )

    def read_prefix(self, condition: TextFeatures, cache: FlexARCache) -> Reading:
        """Read the text, feed the start."""
        cache.text = self.read_text(condition)
        start = (self.start_embed + self.position_embed[:1]).expand(len(condition), -1, -1)  # [b 1 d]
        features = self.trunk(start, cache.text, cache)
        return Reading(features, self.head(features))

    def read_text(self, text: TextFeatures) -> list[TextKeys]:
        """What every block's cross-attention reads of a text; the same at all positions, so it is computed once.

        Raises:
            ValueError: the features are not `text_dim` wide.
        """
        if text.features.shape[2] != self.text_dim:
            raise ValueError(
                f"text features are {text.features.shape[2]} wide, this model reads {self.text_dim}: "
                f"those of {self.config['text_encoder']}"
            )
        projected = self.text_proj(text.features.to(self.device, self.dtype))  # [b s d]
        keep = text.keep.to(self.device)
        return [block.cross_attn.read(projected, keep) for block in self.blocks]  # type: ignore[union-attr,operator]

    def forward(self, condition: TextFeatures, indices: Tensor) -> Tensor:
        """Training pass: texts and the tokens seen so far `[b n]` -> logits `[b n codebook_size]`.

        Logits at a position follow from the text and the tokens before it.
        """
        return self.head(self.trunk(self.embed(indices), self.read_text(condition)))


class TextProjection(nn.Module):
    """Text features to the width of the model: `fc2(gelu(fc1 x))`, without biases; the hidden width is the text's."""

    def __init__(self, text_dim: int, dim: int, gelu: str) -> None:
        super().__init__()
        if gelu not in ("tanh", "none"):
            raise ValueError(f"text_gelu must be 'tanh' or 'none', got {gelu!r}")
        self.gelu = gelu
        self.fc1 = nn.Linear(text_dim, text_dim, bias=False)
        self.fc2 = nn.Linear(text_dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """`[b s text_dim]` -> `[b s dim]`."""
        return self.fc2(F.gelu(self.fc1(features), approximate=self.gelu))


class FlexARBlock(nn.Module):
    """Self-attention, cross-attention to the text if it reads one, gated MLP; each on the normalised stream."""

    def __init__(self, options: BlockOptions, reads_text: bool) -> None:
        super().__init__()
        self.norm1 = options.make_norm()
        self.attn = SelfAttention(
            options.dim, options.num_heads, qkv_bias=options.qkv_bias, out_bias=options.bias
        )
        self.attn.q_norm, self.attn.k_norm = options.make_head_norm(), options.make_head_norm()
        self.norm2 = options.make_norm()
        self.cross_attn = CrossAttention(options) if reads_text else None
        self.norm3 = options.make_norm() if reads_text else None
        self.mlp = GatedMLP(options.dim, options.mlp_dim, bias=options.bias)

    def forward(
        self, hidden_states: Tensor, text: TextKeys | None, mask: AttentionMask, cache: LayerCache | None
    ) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), mask, cache)
        if self.cross_attn is None or self.norm3 is None:
            return hidden_states + self.mlp(self.norm2(hidden_states))
        hidden_states = hidden_states + self.cross_attn(self.norm2(hidden_states), text)
        return hidden_states + self.mlp(self.norm3(hidden_states))


class CrossAttention(nn.Module):
    """Attention from image positions to a text."""

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        dim = options.dim
        self.num_heads = options.num_heads
        self.query = nn.Linear(dim, dim, bias=options.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=options.qkv_bias)
        self.value = nn.Linear(dim, dim, bias=options.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=options.bias)
        self.q_norm, self.k_norm = options.make_head_norm(), options.make_head_norm()

    def read(self, text: Tensor, keep: Tensor) -> TextKeys:
        """Keys and values of `text [b s d]`, of which `keep [b s]` are seen."""
        return TextKeys(self.k_norm(self._heads(self.key(text))), self._heads(self.value(text)), keep)

    def forward(self, hidden_states: Tensor, text: TextKeys) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        q = self.q_norm(self._heads(self.query(hidden_states)))
        seen = attention(q, text.keys, text.values, KeyMask(text.keep))  # [b h n d]
        return self.proj(rearrange(seen, "b h n d -> b n (h d)"))

    def _heads(self, projected: Tensor) -> Tensor:
        return rearrange(projected, "b n (h d) -> b h n d", h=self.num_heads)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
