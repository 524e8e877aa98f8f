"""TextAR: our small text-to-image generator, next token with a byte-level text prefix.

A LLaMA-style decoder (RMSNorm, SwiGLU, query-key norm; Touvron et al. 2023, section 2.2) over one sequence: the
text, a start token, the image tokens. The text is raw UTF-8, so every language and every emoji name works without
a vocabulary; short convolutions turn bytes into word-like features at half the length. Text and image positions
are learned and fixed in number, so all rows of a batch have the same shape whatever their prompts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import CausalMask
from vistok.models.generators.base import NextTokenGenerator
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.kv_cache import KVCache, LayerCache
from vistok.models.layers.norm import RMSNorm

PAD_BYTE = 256  # fills the text up to its fixed length; a text of nothing but it is "no text"
TEXT_STRIDE = 2  # bytes per text position


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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if text_length % TEXT_STRIDE:
            raise ValueError(f"text_length {text_length} is not a multiple of {TEXT_STRIDE}")
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.text_length = text_length
        self.text_encoder = ByteEncoder(dim, text_length)
        self.start_embed = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.token_embed = nn.Embedding(codebook_size, dim)
        self.position_embed = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TextARBlock(dim, num_heads, mlp_dim, dropout) for _ in range(depth))
        self.norm = RMSNorm(dim)
        for part in (self.token_embed, self.blocks):
            part.apply(_init_weights)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """UTF-8 bytes of the prompts, `[b text_length]` int64, filled up with `PAD_BYTE`.

        Raises:
            ValueError: a prompt is empty or has more bytes than `text_length`.
        """
        rows = torch.full((len(prompts), self.text_length), PAD_BYTE, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            text = prompt.strip().lower().encode()
            if not text:
                raise ValueError("the prompt is empty; describe what to draw, for example 'red apple'")
            if len(text) > self.text_length:
                raise ValueError(
                    f"the prompt has {len(text)} bytes, this model reads at most {self.text_length}: {prompt[:40]!r}..."
                )
            row[: len(text)] = torch.tensor(list(text))
        return rows

    def null_condition(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, self.text_length), PAD_BYTE, dtype=torch.int64)

    def new_cache(self, batch_size: int) -> KVCache:
        return KVCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.config["num_heads"],
            max_length=self.text_length // TEXT_STRIDE + self.num_tokens,
            head_dim=self.config["dim"] // self.config["num_heads"],
            dtype=self.dtype,
            device=self.device,
        )

    def prefill(self, condition: Tensor, cache: KVCache) -> Tensor:
        """Feed text `[b text_length]` and the start token; returns logits `[b codebook_size]`."""
        start = (self.start_embed + self.position_embed[:, :1]).expand(len(condition), -1, -1)
        hidden_states = torch.cat([self.text_encoder(condition), start], dim=1)  # [b t+1 d]
        return self._logits(hidden_states, cache)[:, -1]

    def step(self, indices: Tensor, cache: KVCache) -> Tensor:
        position = cache.length - self.text_length // TEXT_STRIDE
        embedded = self.token_embed(indices)[:, None] + self.position_embed[:, position : position + 1]
        return self._logits(embedded, cache)[:, -1]

    def forward(self, condition: Tensor, indices: Tensor) -> Tensor:
        """Training pass: text `[b text_length]` and the tokens seen so far `[b n]` -> logits `[b n codebook_size]`.

        Logits at a position follow from the text and the tokens before it.
        """
        embedded = torch.cat(
            [self.start_embed.expand(len(indices), -1, -1), self.token_embed(indices[:, :-1])], dim=1
        )
        hidden_states = torch.cat([self.text_encoder(condition), embedded + self.position_embed], dim=1)
        return self._logits(self.embed_dropout(hidden_states), None, last=self.num_tokens)

    def _logits(self, hidden_states: Tensor, cache: KVCache | None, last: int = 1) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, cache.layers[i] if cache is not None else None)
        # The embedding also gives the logits (Press and Wolf 2017): half of a small model would be these two tables.
        return F.linear(self.norm(hidden_states[:, -last:]), self.token_embed.weight)


class ByteEncoder(nn.Module):
    """Bytes `[b text_length]` -> features `[b text_length/2 d]`: byte embedding, two convolutions, positions."""

    def __init__(self, dim: int, text_length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(PAD_BYTE + 1, dim // 2)
        self.conv1 = nn.Conv1d(dim // 2, dim, 5, padding=2)
        self.conv2 = nn.Conv1d(dim, dim, 4, stride=TEXT_STRIDE, padding=1)
        self.position_embed = nn.Parameter(torch.randn(1, text_length // TEXT_STRIDE, dim) * 0.02)
        # What the bytes say must outweigh biases and positions from the start, or the text is never listened to.
        nn.init.normal_(self.embed.weight)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, text: Tensor) -> Tensor:
        """`[b text_length]` int64 -> `[b text_length/2 d]`."""
        features = F.silu(self.conv1(rearrange(self.embed(text), "b t d -> b d t")))
        return rearrange(self.conv2(features), "b d t -> b t d") + self.position_embed


class TextARBlock(nn.Module):
    """Causal self-attention and SwiGLU, each on the RMS-normalised stream and added to it."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, out_bias=False, qk_norm=True)
        self.norm2 = RMSNorm(dim)
        self.gate_up = nn.Linear(dim, 2 * mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, cache: LayerCache | None) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        hidden_states = hidden_states + self.dropout(
            self.attn(self.norm1(hidden_states), CausalMask(), cache)
        )
        gate, up = self.gate_up(self.norm2(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.dropout(self.down(F.silu(gate) * up))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
