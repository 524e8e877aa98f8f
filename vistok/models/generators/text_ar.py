"""TextAR: our small text-to-image generator, next token with a byte-level text prefix.

A LLaMA-style decoder (RMSNorm, SwiGLU, query-key norm; Touvron et al. 2023, section 2.2) over one sequence: the
text, a start token, the image tokens. The text is raw UTF-8, so every language and every emoji name works without
a vocabulary: bytes are embedded together with hashes of the n-grams that end at them (BLT, Pagnoni et al. 2024,
section 3.2.1), and short convolutions turn them into word-like features at half the length. A summary of the text is
added to every image position as well, as a class would be; without it a small model learns for long to continue
images before it listens to the text. Text and image positions are learned and fixed in number, so all rows of a batch
have the same shape whatever their prompts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, CausalMask, TreeMask
from vistok.models.generators.base import NextTokenGenerator, Reading
from vistok.models.generators.prompts import warn_of_cut
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.norm import RMSNorm

PAD_BYTE = 256  # fills the text up to its fixed length; a text of nothing but it is "no text"
TEXT_STRIDE = 2  # bytes per text position
NGRAM_SIZES = (3, 4, 6)  # bytes
HASH_PRIME, HASH_FACTOR = 1_000_003, 7919


class TextAR(NextTokenGenerator):
    """Next-token generator conditioned on text.

    Args:
        codebook_size: image token ids.
        num_tokens: image tokens per image.
        text_length: most bytes of a prompt, a multiple of 2.
        dim: width.
        depth: transformer blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the SwiGLU layers.
        ngram_buckets: rows of the table that hashed n-grams share.
        dropout: after embeddings, attention and MLP, in training.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        num_tokens: int = 64,
        text_length: int = 64,
        dim: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        mlp_dim: int = 704,
        ngram_buckets: int = 2048,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if text_length % TEXT_STRIDE:
            raise ValueError(f"text_length {text_length} is not a multiple of {TEXT_STRIDE}")
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.text_length = text_length
        self.text_encoder = ByteEncoder(dim, text_length, ngram_buckets)
        self.start_embed = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.token_embed = nn.Embedding(codebook_size, dim)
        self.position_embed = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TextARBlock(dim, num_heads, mlp_dim, dropout) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.embed_scale = dim**0.5  # a tied embedding is small, as logits want it; the stream wants it large
        for part in (self.token_embed, self.blocks):
            part.apply(_init_weights)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """UTF-8 bytes of the prompts, `[b text_length]` int64, filled up with `PAD_BYTE`.

        Of a longer prompt the first `text_length` bytes are read, as far as they are whole characters; a warning says
        where it was cut.

        Raises:
            ValueError: a prompt is empty.
        """
        rows = torch.full((len(prompts), self.text_length), PAD_BYTE, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            text = prompt.strip().lower().encode()
            if not text:
                raise ValueError("the prompt is empty; describe what to draw, for example 'red apple'")
            if len(text) > self.text_length:
                kept = text[: self.text_length].decode(errors="ignore")
                warn_of_cut(kept, len(text), self.text_length, "bytes")
                text = kept.encode()
            row[: len(text)] = torch.tensor(list(text))
        return rows

    def null_condition(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, self.text_length), PAD_BYTE, dtype=torch.int64)

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> TextARCache:
        return TextARCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.config["num_heads"],
            max_length=self.text_length // TEXT_STRIDE + (num_tokens or self.num_tokens),
            head_dim=self.config["dim"] // self.config["num_heads"],
            dtype=self.dtype,
            device=self.device,
        )

    def read_prefix(self, condition: Tensor, cache: KVCache) -> Reading:
        """Feed text `[b text_length]` and the start token."""
        assert isinstance(cache, TextARCache)
        text, cache.summary = self.text_encoder(condition)
        start = self._embed(self.start_embed.expand(len(condition), -1, -1), cache.summary, first=0)
        features = self._features(torch.cat([text, start], dim=1), cache)
        return Reading(features, self.features_to_logits(features[:, -1:]))

    def step(self, indices: Tensor, cache: KVCache) -> Tensor:
        assert isinstance(cache, TextARCache)
        position = cache.length - self.text_length // TEXT_STRIDE
        embedded = self._embed(self.token_embed(indices), cache.summary, first=position)
        return self.features_to_logits(self._features(embedded, cache))

    def read_nodes(self, indices: Tensor, depths: Tensor, mask: TreeMask, cache: KVCache) -> Reading:
        assert isinstance(cache, TextARCache)
        places = cache.node_places(depths) - self.text_length // TEXT_STRIDE  # [r t]
        positions = self.position_embed[0, places.clamp(max=self.num_tokens - 1)]
        embedded = (self.token_embed(indices) + positions) * self.embed_scale + cache.summary
        features = self._features(embedded, cache, mask)
        return Reading(features, self.features_to_logits(features))

    def embed_tokens(self, indices: Tensor) -> Tensor:
        return self.token_embed(indices)

    def forward(self, condition: Tensor, indices: Tensor) -> Tensor:
        """Training pass: text `[b text_length]` and the tokens seen so far `[b n]` -> logits `[b n codebook_size]`.

        Logits at a position follow from the text and the tokens before it.
        """
        text, summary = self.text_encoder(condition)
        start = self.start_embed.expand(len(indices), -1, -1)
        embedded = self._embed(torch.cat([start, self.token_embed(indices[:, :-1])], dim=1), summary, first=0)
        hidden_states = self.embed_dropout(torch.cat([text, embedded], dim=1))
        return self.features_to_logits(self._features(hidden_states, None)[:, -self.num_tokens :])

    def _embed(self, embedded: Tensor, summary: Tensor, first: int) -> Tensor:
        """Embedded tokens `[b n d]` from position `first` on, with their positions and the text's summary `[b 1 d]`."""
        positions = self.position_embed[:, first : first + embedded.shape[1]]
        return (embedded + positions) * self.embed_scale + summary

    def _features(
        self, hidden_states: Tensor, cache: KVCache | None, mask: AttentionMask | None = None
    ) -> Tensor:
        """All blocks, causal unless another mask is given, and the last norm: `[b n d]` -> `[b n d]`."""
        mask = mask or CausalMask()
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, mask, cache.layers[i] if cache is not None else None)
        return self.norm(hidden_states)

    def features_to_logits(self, features: Tensor) -> Tensor:
        # The embedding also gives the logits (Press and Wolf 2017): half of a small model would be these two tables.
        return F.linear(features, self.token_embed.weight)


class TextARCache(KVCache):
    """Also keeps the summary of the text `[b 1 d]`, which every image position gets."""

    summary: Tensor

    def tensors(self) -> list[Tensor]:
        """See `KVCache`; after `prefill`."""
        return [*super().tensors(), self.summary]

    def narrow(self, batch_size: int) -> TextARCache:
        """See `KVCache.narrow`; after `prefill`."""
        view = super().narrow(batch_size)
        assert isinstance(view, TextARCache)
        view.summary = self.summary[:batch_size]
        return view

    def put_rows(self, slots: Tensor, source: KVCache, rows: Tensor) -> None:
        """See `KVCache.put_rows`."""
        super().put_rows(slots, source, rows)
        assert isinstance(source, TextARCache)
        if not hasattr(self, "summary"):
            self.summary = source.summary.new_zeros(self.batch_size, *source.summary.shape[1:])
        self.summary[slots] = source.summary[rows]


class ByteEncoder(nn.Module):
    """Bytes `[b text_length]` -> features `[b text_length/2 d]` and their summary `[b 1 d]`."""

    def __init__(self, dim: int, text_length: int, ngram_buckets: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(PAD_BYTE + 1, dim // 2)
        self.ngram_embed = nn.Embedding(ngram_buckets, dim // 2)
        self.conv1 = nn.Conv1d(dim // 2, dim, 5, padding=2)
        self.conv2 = nn.Conv1d(dim, dim, TEXT_STRIDE, stride=TEXT_STRIDE)
        self.position_embed = nn.Parameter(torch.randn(1, text_length // TEXT_STRIDE, dim) * 0.02)
        self.to_summary = nn.Linear(dim, dim)
        # What the bytes say must outweigh biases and positions from the start, or the text is never listened to.
        for table in (self.embed, self.ngram_embed):
            nn.init.normal_(table.weight)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.to_summary.weight, std=0.3 * dim**-0.5)
        nn.init.zeros_(self.to_summary.bias)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """`[b text_length]` int64 -> features `[b text_length/2 d]`, summary `[b 1 d]`."""
        ngrams = sum(
            self.ngram_embed(hashed) for hashed in hash_ngrams(text, self.ngram_embed.num_embeddings)
        )
        is_text = (text != PAD_BYTE)[..., None]
        embedded = self.embed(text) + ngrams * is_text  # [b t d/2]
        features = F.silu(self.conv1(rearrange(embedded, "b t d -> b d t")))
        features = rearrange(self.conv2(features), "b d t -> b t d") + self.position_embed  # [b t/2 d]
        weights = is_text[:, ::TEXT_STRIDE].to(features.dtype)
        total = (features * weights).sum(dim=1, keepdim=True)  # [b 1 d]
        return features, self.to_summary(total / weights.sum(dim=1, keepdim=True).clamp_min(1).sqrt())


def hash_ngrams(text: Tensor, buckets: int) -> list[Tensor]:
    """For every size of n-gram, the bucket of the one that ends at each byte: `[b t]` int64 in `[0, buckets)`."""
    longest = max(NGRAM_SIZES)
    padded = F.pad(text, (longest - 1, 0), value=PAD_BYTE)
    key = torch.zeros_like(text)
    hashes = []
    for size in range(1, longest + 1):  # the last byte first
        byte = padded[:, longest - size : padded.shape[1] - size + 1]
        key = (key * (PAD_BYTE + 1) + byte) % HASH_PRIME
        if size in NGRAM_SIZES:
            hashes.append((key * HASH_FACTOR + size) % buckets)
    return hashes


class TextARBlock(nn.Module):
    """Self-attention and SwiGLU, each on the RMS-normalised stream and added to it."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, out_bias=False, qk_norm=True)
        self.norm2 = RMSNorm(dim)
        self.gate_up = nn.Linear(dim, 2 * mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, mask: AttentionMask, cache: LayerCache | None) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        hidden_states = hidden_states + self.dropout(self.attn(self.norm1(hidden_states), mask, cache))
        gate, up = self.gate_up(self.norm2(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.dropout(self.down(F.silu(gate) * up))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
