"""Self-attention with a fused projection, shared by the transformers of the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, attention
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.norm import RMSNorm
from vistok.models.layers.rope import Rotation, rotate


class SelfAttention(nn.Module):
    """Multi-head self-attention: fused q, k, v projection, scale `head_dim ** -0.5`, output projection.

    Args:
        dim: width; must be a multiple of `num_heads`.
        num_heads: heads.
        qkv_bias: whether the fused projection has a bias.
        out_bias: whether the output projection has a bias.
        qk_norm: RMS-normalise queries and keys per head (Dehghani et al. 2023, section 2).
        float32_attention: softmax and both products in float32, under autocast and with weights of lower precision.
        dropout: in training, on the attention weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: bool = False,
        float32_attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if dropout and float32_attention:
            raise ValueError("float32_attention has no dropout; choose one of the two")
        self.num_heads = num_heads
        self.float32_attention = float32_attention
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias)
        self.q_norm: nn.Module = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask | None = None,
        cache: LayerCache | None = None,
        rotation: Rotation | None = None,
        num_queries: int | None = None,
    ) -> Tensor:
        """`hidden_states [b n d]` -> `[b n d]`; with a cache, the keys are all that were appended so far.

        A `rotation` from `axial_rope` turns the new queries and keys. With `num_queries` only the last so many tokens
        are asked for, `[b num_queries d]`; the others are keys.
        """
        qkv = self.qkv(hidden_states)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None and not self.float32_attention and num_queries is None:
            hidden_states = cache.attend(q, k, v, mask, rotation)  # [b h n d]
            return self.proj(rearrange(hidden_states, "b h n d -> b n (h d)"))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if num_queries is not None:
            q = q[:, :, q.shape[2] - num_queries :]
        if cache is not None:
            k, v = cache.append(k, v)
        if self.float32_attention:
            with torch.autocast(q.device.type, enabled=False):
                hidden_states = attention(q.float(), k.float(), v.float(), mask).to(qkv.dtype)  # [b h n d]
        elif self.training and self.dropout > 0:
            dense = None if mask is None else mask.dense(q.shape[-2], k.shape[-2], q.device)
            hidden_states = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, dropout_p=self.dropout)
        else:
            hidden_states = attention(q, k, v, mask)  # [b h n d]
        return self.proj(rearrange(hidden_states, "b h n d -> b n (h d)"))
