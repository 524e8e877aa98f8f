"""EAGLE: a drafter that predicts the next feature of its target from the last feature and the token drawn after it
(Li et al. 2024, "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty"), as LANTERN uses it
for images (Jang et al. 2024).

A feature is what the head of the target reads. Position j of the drafter holds the feature of the target's position j and
the token at its position j + 1, and predicts the feature of j + 1, so that the head of the target gives the distribution
of token j + 2. With a condition of c positions, those in front of the last have no token after them that was drawn; they
are fed with token id 0, as in the release, or left out (`prefix_length=0`). The first image token comes with the feature
of the last condition position, at drafter position `prefix_length`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.mlp import GatedMLP
from vistok.models.layers.norm import RMSNorm
from vistok.models.layers.rope import Rotation, axial_rope

POSITIONS = ("grid", "line", "table")


class EagleDrafter(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """One or a few transformer blocks over pairs of a feature and a token; the defaults are the release for LlamaGen.

    Args:
        codebook_size: image token ids, those of the target.
        num_tokens: image tokens per image, those of the target.
        prefix_length: condition positions in front of the first image token, at most one less than the target has.
        dim: width, that of the target's features.
        depth: blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the gated MLP.
        positions: `"grid"`: rotary over rows and columns, with no rotation but cosine and sine 0 at the condition, as in
            LlamaGen; `"line"`: rotary over the index in the sequence; `"table"`: learned vectors, added to the input.
        norm_eps: of all norms.
        rope_base: of the rotary positions.
        input_norm: whether the first block normalises its input, as all others do.
        qk_norm: LayerNorm of queries and keys with weights and biases per head (Chameleon).
        own_tokens: whether the drafter stores a token table; otherwise it reads that of the target.
        target: `model_identity` of the generator that it was trained for, where that is known.

    Raises:
        ValueError: sizes that do not fit each other, or unknown positions.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        num_tokens: int = 256,
        prefix_length: int = 119,
        dim: int = 1280,
        depth: int = 1,
        num_heads: int = 20,
        mlp_dim: int = 3584,
        positions: str = "grid",
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
        input_bias: bool = True,
        input_norm: bool = False,
        qk_norm: bool = False,
        own_tokens: bool = True,
        target: str | None = None,
    ) -> None:
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f"unknown positions {positions!r}; choose one of {', '.join(POSITIONS)}")
        if positions == "grid" and math.isqrt(num_tokens) ** 2 != num_tokens:
            raise ValueError(f"num_tokens {num_tokens} does not make a square grid; choose other positions")
        if prefix_length < 0:
            raise ValueError(f"prefix_length must be at least 0, got {prefix_length}")
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.prefix_length = prefix_length
        self.token_embed = nn.Embedding(codebook_size, dim).requires_grad_(False) if own_tokens else None
        self.fuse = nn.Linear(2 * dim, dim, bias=input_bias)
        if positions == "table":
            self.position_embed = nn.Parameter(torch.randn(prefix_length + num_tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(
            EagleBlock(dim, num_heads, mlp_dim, norm_eps, has_input_norm=input_norm or i > 0, qk_norm=qk_norm)
            for i in range(depth)
        )
        for part in (self.fuse, self.blocks):
            part.apply(_init_weights)

    def new_cache(self, batch_size: int, num_extra: int = 0) -> KVCache:
        """An empty cache for `batch_size` rows, with room for `num_extra` positions beyond those of an image."""
        return KVCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.config["num_heads"],
            max_length=self.prefix_length + self.num_tokens + num_extra,
            head_dim=self.config["dim"] // self.config["num_heads"],
            dtype=self.dtype,
            device=self.device,
        )

    def embed_tokens(self, indices: Tensor) -> Tensor:
        """`[r n]` int64 -> `[r n d]` of the drafter's own table.

        Raises:
            ValueError: it has none and reads that of its target.
        """
        if self.token_embed is None:
            raise ValueError("this drafter has no token table of its own: embed tokens with its target")
        return self.token_embed(indices)

    def forward(
        self,
        features: Tensor,
        token_embeds: Tensor,
        positions: Tensor,
        mask: AttentionMask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Predict the features that follow.

        Args:
            features: `[r n d]`, of the target, or predicted before.
            token_embeds: `[r n d]`, of the tokens drawn after them.
            positions: `[n]` or `[r n]` int64, counted from the first condition position of the drafter. Those beyond the
                last of an image, where a draft can run over its end, are allowed.
            mask: who sees whom; `None`: everyone sees all.
            cache: holds everything fed before, and takes up the new positions.

        Returns:
            `[r n d]`; the head of the target reads them as they are.
        """
        hidden_states = self.fuse(torch.cat([token_embeds, features], dim=-1))
        rotation = None
        if self.config["positions"] == "table":
            known = positions.clamp(max=len(self.position_embed) - 1)
            hidden_states = hidden_states + self.position_embed[known]
        else:
            rotation = self.rotation(positions)
        for i, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states, rotation, mask, cache.layers[i] if cache is not None else None
            )
        return hidden_states

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotary factors at `positions`: `[n d/2]` each, or `[r 1 n d/2]` for positions per row."""
        head_dim = self.config["dim"] // self.config["num_heads"]
        if self.config["positions"] == "line":
            cos, sin = axial_rope(positions[..., None], head_dim, self.config["rope_base"])
        else:
            side = math.isqrt(self.num_tokens)
            places = positions - self.prefix_length
            is_image = (places >= 0) & (places < self.num_tokens)
            coordinates = torch.stack([places // side, places % side], dim=-1)
            # The condition and what lies beyond the image are not left unturned: their queries and keys vanish.
            cos, sin = (
                factor * is_image[..., None]
                for factor in axial_rope(coordinates, head_dim, self.config["rope_base"])
            )
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])


class EagleBlock(nn.Module):
    """Self-attention and gated MLP, added to the stream; the first block of the release attends to it as it is."""

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, norm_eps: float, *, has_input_norm: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = _norm(dim, norm_eps) if has_input_norm else nn.Identity()
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, out_bias=False)
        if qk_norm:
            self.attn.q_norm = HeadNorm(num_heads, dim // num_heads, norm_eps)
            self.attn.k_norm = HeadNorm(num_heads, dim // num_heads, norm_eps)
        self.norm2 = _norm(dim, norm_eps)
        self.mlp = GatedMLP(dim, mlp_dim)

    def forward(
        self,
        hidden_states: Tensor,
        rotation: Rotation | None,
        mask: AttentionMask | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), mask, cache, rotation)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class HeadNorm(nn.Module):
    """LayerNorm over the channels of each head, with weights and biases of its own (Chameleon Team 2024, section 2.3)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b h n d]` -> `[b h n d]`."""
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        return normed * self.weight[:, None] + self.bias[:, None]


def _norm(dim: int, eps: float) -> RMSNorm:
    return RMSNorm(dim, eps, weight_after_cast=True)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
