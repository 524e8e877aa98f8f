"""What FlexTok's encoder and decoder are made of: embeddings, transformer blocks, attention and MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, CausalMask, attention

ATTENTION_SCALE = 8.0  # over head_dim: the scale of muP, equal to the usual one at head_dim 64
TIME_PERIOD = 256.0  # longest period of the time features, in units of their argument


@dataclass(frozen=True)
class TransformerOptions:
    """What the blocks of the encoder and of the decoder share."""

    head_dim: int = 64
    mlp_ratio: float = 4.0
    gated_mlp: bool = True
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    norm_eps: float = 1e-5


class PatchEmbed(nn.Module):
    """Latents -> patches with fixed positions, and back.

    Args:
        channels: of the latents.
        patch_size: latents per side of a patch.
        grid_size: patches per side of the largest image.
        dim: width, a multiple of 4.
    """

    def __init__(self, channels: int, patch_size: int, grid_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = linear(channels * patch_size**2, dim)
        # Part of published files, and a parameter, so that it is saved and counted; it is never trained.
        self.positions = nn.Parameter(sine_cosine_table(grid_size, dim)[None], requires_grad=False)

    def forward(self, latents: Tensor) -> Tensor:
        """`[b c h w]` -> `[b p d]`, row by row; a smaller image takes the top left part of the positions."""
        p = self.patch_size
        rows, columns = latents.shape[-2] // p, latents.shape[-1] // p
        if latents.shape[-2] % p or latents.shape[-1] % p or max(rows, columns) > self.positions.shape[-1]:
            largest = self.positions.shape[-1] * p
            raise ValueError(
                f"latents must be at most {largest} x {largest} and multiples of {p}, got {list(latents.shape[-2:])}"
            )
        patches = rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        positions = rearrange(self.positions[:, :, :rows, :columns], "b d h w -> b (h w) d")
        return self.proj(patches.to(self.proj.weight.dtype)) + positions

    def to_latents(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """`[b p channels*patch_size**2]` -> `[b c h w]` of `size` (h, w)."""
        p = self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=size[0] // p, p=p, q=p)


class TimeEmbed(nn.Module):
    """Times -> vectors: sines and cosines, then two layers.

    Args:
        dim: width of the vectors.
        num_features: number of sines and cosines together.
        max_timestep: times are multiplied by `1000 / max_timestep`.
    """

    def __init__(self, dim: int, num_features: int, max_timestep: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.max_timestep = max_timestep
        self.fc1 = linear(num_features, dim)
        self.fc2 = linear(dim, dim)

    def forward(self, times: Tensor) -> Tensor:
        """`[t]` -> `[t d]`."""
        features = time_features(times, self.num_features, self.max_timestep)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


class EncoderBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, dim: int, options: TransformerOptions) -> None:
        super().__init__()
        self.norm_eps = options.norm_eps
        self.attn = FlexTokAttention(dim, options)
        self.mlp = FlexTokMLP(dim, options)

    def forward(self, hidden_states: Tensor, num_patches: int) -> Tensor:
        """`[b p+n d]`, `num_patches` of them patches -> `[b p+n d]`."""
        attended = self.attn.prefix_causal(layer_norm(hidden_states, self.norm_eps), num_patches)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(layer_norm(hidden_states, self.norm_eps))


PATCHES, REGISTERS = 0, 1  # the two groups of tokens that are modulated by themselves


class Packing(NamedTuple):
    """What a decoder's sequence consists of, `[patches | registers]`.

    A guided step is one sequence, in which both passes share everything but the attention: `[null register | patches |
    patches | registers]`, of which the first two are the unconditional pass.
    """

    num_patches: int  # of a pass
    num_registers: int
    mask: AttentionMask | None = None  # of the only or conditional pass
    null_mask: AttentionMask | None = (
        None  # of the unconditional pass, with the null register as the last key
    )
    is_guided: bool = False

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Group and number of tokens of every part, from the first on."""
        if self.is_guided:
            return ((REGISTERS, 1), (PATCHES, 2 * self.num_patches), (REGISTERS, self.num_registers))
        return ((PATCHES, self.num_patches), (REGISTERS, self.num_registers))

    def add_product(self, added: Tensor, tokens: Tensor, factors: Tensor) -> Tensor:
        """`added + tokens * factors`, where `tokens` are `[b m d]`, and the others that or `[group b 1 d]`."""
        sizes = [size for _, size in self.parts]
        groups = [group for group, _ in self.parts]
        of_parts = [
            x.split(sizes, dim=1) if x.ndim == 3 else [x[group] for group in groups]
            for x in (added, tokens, factors)
        ]
        return torch.cat([torch.addcmul(*part) for part in zip(*of_parts, strict=True)], dim=1)


class DecoderBlock(nn.Module):
    """An encoder block's sums with shifts, factors and gates of the time, for patches and registers by themselves.

    As in DiT (Peebles and Xie 2023, section 3.2), but in another order: gate of the attention, gate of the MLP, shift and
    factor of the attention, shift and factor of the MLP. A factor is one more than the scale that the network predicts.
    """

    def __init__(self, dim: int, options: TransformerOptions) -> None:
        super().__init__()
        self.norm_eps = options.norm_eps
        self.attn = FlexTokAttention(dim, options)
        self.mlp = FlexTokMLP(dim, options)

    def forward(self, hidden_states: Tensor, modulation: Tensor, packing: Packing) -> Tensor:
        """`[b m d]` -> `[b m d]`; `modulation [part group b 1 d]`, or with one row for all images."""
        gate_attn, gate_mlp, shift_attn, factor_attn, shift_mlp, factor_mlp = modulation
        normed = layer_norm(hidden_states, self.norm_eps)
        attended = self.attn.packed(packing.add_product(shift_attn, normed, factor_attn), packing)
        hidden_states = packing.add_product(hidden_states, attended, gate_attn)
        normed = layer_norm(hidden_states, self.norm_eps)
        inner = self.mlp(packing.add_product(shift_mlp, normed, factor_mlp))
        return packing.add_product(hidden_states, inner, gate_mlp)


class FlexTokAttention(nn.Module):
    """Self-attention with parameter-free normalisation of queries and keys and the scale `8 / head_dim`."""

    def __init__(self, dim: int, options: TransformerOptions) -> None:
        super().__init__()
        if dim % options.head_dim:
            raise ValueError(f"dim {dim} is not a multiple of head_dim {options.head_dim}")
        self.options = options
        self.qkv = linear(dim, 3 * dim, bias=options.qkv_bias, parts=3)
        self.proj = linear(dim, dim, bias=options.proj_bias)

    def forward(self, hidden_states: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        return self._out(attention(*self._heads(hidden_states), mask, scale=self._scale))

    def prefix_causal(self, hidden_states: Tensor, num_patches: int) -> Tensor:
        """`[b p+n d]` -> `[b p+n d]`: patches see patches, a register sees patches and registers up to itself.

        Computed as two attentions, of which only that of the registers has a mask.
        """
        q, k, v = self._heads(hidden_states)
        p = num_patches
        patches = attention(q[:, :, :p], k[:, :, :p], v[:, :, :p], scale=self._scale)
        registers = attention(q[:, :, p:], k, v, CausalMask(), scale=self._scale)
        return self._out(torch.cat([patches, registers], dim=2))

    def packed(self, hidden_states: Tensor, packing: Packing) -> Tensor:
        """`[b m d]` -> `[b m d]`: every pass sees itself."""
        q, k, v = self._heads(hidden_states)
        if not packing.is_guided:
            return self._out(attention(q, k, v, packing.mask, scale=self._scale))
        end = 1 + packing.num_patches  # of the unconditional pass; as a key, its register comes last
        null_k, null_v = (x[:, :, :end].roll(-1, dims=2) for x in (k, v))
        passes = (
            attention(q[:, :, :end], null_k, null_v, packing.null_mask, scale=self._scale),
            attention(q[:, :, end:], k[:, :, end:], v[:, :, end:], packing.mask, scale=self._scale),
        )
        return self._out(torch.cat(passes, dim=2))

    @property
    def _scale(self) -> float:
        return ATTENTION_SCALE / self.options.head_dim

    def _heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[b n d]` -> queries, keys and values `[b h n head_dim]`."""
        split = "b n (three h d) -> three b h n d"
        q, k, v = rearrange(self.qkv(hidden_states), split, three=3, d=self.options.head_dim)
        if self.options.qk_norm:
            q, k = layer_norm(q, self.options.norm_eps), layer_norm(k, self.options.norm_eps)
        return q, k, v

    def _out(self, attended: Tensor) -> Tensor:
        return self.proj(rearrange(attended, "b h n d -> b n (h d)"))


class FlexTokMLP(nn.Module):
    """`fc2(silu(fc1(x)) * fc3(x))` (Shazeer 2020), two thirds as wide as without the gate `fc3`."""

    def __init__(self, dim: int, options: TransformerOptions) -> None:
        super().__init__()
        width = int(options.mlp_ratio * dim)
        if options.gated_mlp:
            width = int(2 * width / 3)
        self.fc1 = linear(dim, width, bias=options.mlp_bias)
        self.fc2 = linear(width, dim, bias=options.mlp_bias)
        self.fc3 = linear(dim, width, bias=options.mlp_bias) if options.gated_mlp else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        inner = F.silu(self.fc1(hidden_states))
        return self.fc2(inner if self.fc3 is None else inner * self.fc3(hidden_states))


def layer_norm(hidden_states: Tensor, eps: float) -> Tensor:
    """Normalise the last axis, without parameters; computed in float32, returned in the input's dtype."""
    return F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=eps).to(hidden_states.dtype)


def sine_cosine_table(grid_size: int, dim: int) -> Tensor:
    """Positions on a grid, `[dim grid_size grid_size]`: sines and cosines of the row, then those of the column."""
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for positions on a grid, got {dim}")
    rates = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = rates[:, None] * torch.arange(grid_size)  # [d/4 g]
    waves = torch.cat([angles.sin(), angles.cos()]).float()  # [d/2 g]
    rows = waves[:, :, None].expand(-1, -1, grid_size)
    columns = waves[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([rows, columns])


def time_features(times: Tensor, num_features: int, max_timestep: float) -> Tensor:
    """Cosines, then sines, of `times [t]` at geometric rates: `[t num_features]` float32."""
    half = num_features // 2
    rates = torch.exp(torch.arange(half, device=times.device) * (-math.log(TIME_PERIOD) / half))
    angles = times.float()[:, None] * (1000 / max_timestep * rates)  # [t half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def linear(in_dim: int, out_dim: int, *, bias: bool = True, parts: int = 1) -> nn.Linear:
    """A linear layer with Xavier-uniform weights, each of the `parts` of a fused projection by itself."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    with torch.no_grad():
        for part in layer.weight.chunk(parts):
            nn.init.xavier_uniform_(part)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def zero_linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def learned(*shape: int) -> nn.Parameter:
    """Learned vectors, `[*shape]`, normal with standard deviation 0.02."""
    vectors = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(vectors, std=0.02)
    return vectors
