"""The pre-norm transformer block shared by TiTok, the U-ViT generator and our own tokenizer."""

from __future__ import annotations

from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.layer_cache import LayerCache


class PreNormBlock(nn.Module):
    """`x + attention(norm1(x))`, then `x + fc2(gelu(fc1(norm2(x))))`; LayerNorm eps 1e-5, exact GELU.

    Args:
        dim: width.
        num_heads: attention heads.
        mlp_dim: width of the hidden MLP layer.
        qkv_bias: whether the fused q, k, v projection has a bias.
        float32_attention: see `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        qkv_bias: bool = True,
        float32_attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias, float32_attention=float32_attention)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(
        self, hidden_states: Tensor, mask: AttentionMask | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """`[b n d]` -> `[b n d]`; with a cache, see `SelfAttention`."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), mask, cache)
        return hidden_states + self.fc2(self.act(self.fc1(self.norm2(hidden_states))))
