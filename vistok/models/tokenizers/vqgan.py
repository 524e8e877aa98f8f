"""VQGAN: the convolutional autoencoder with a vector-quantised grid of codes (Esser et al. 2021, section 3.1).

This is the variant of LlamaGen (Sun et al. 2024, section 2.1): codes of few dimensions, normalised to unit length when
they are used (Yu et al. 2021). Its published VQ-8 and VQ-16 differ in `dim_mults` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import attention
from vistok.models.layers.upsample import UpsampleConv
from vistok.models.quantizers.base import QuantizerOutput
from vistok.models.quantizers.vq import VQ
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Layout, Tokens

NORM_GROUPS = 32
NORM_EPS = 1e-6


class VQGAN(ImageTokenizer):
    """Images <-> a grid of code indices, one per `downsample_factor x downsample_factor` pixels.

    Args:
        image_size: pixels per side, a multiple of `2 ** (len(dim_mults) - 1)`.
        codebook_size: number of codes.
        codebook_dim: width of a code.
        commitment_cost: weight of the commitment loss.
        entropy_cost: weight of the entropy loss, see `VQ`.
        use_l2_norm: normalise latents and codes to unit length before they are compared and decoded.
        latent_dim: channels between the convolutions and the projections to and from the codes.
        dim: base number of channels, a multiple of 32.
        dim_mults: channels of each level in units of `dim`, full resolution first; every further level halves it.
        depth: residual blocks per level of the encoder; the decoder has one more.

    Raises:
        ValueError: `image_size` is not a multiple of the downsampling factor, or `dim` not one of 32.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        commitment_cost: float = 0.25,
        entropy_cost: float = 0.0,
        use_l2_norm: bool = True,
        latent_dim: int = 256,
        dim: int = 128,
        dim_mults: Sequence[int] = (1, 1, 2, 2, 4),
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.downsample_factor = 2 ** (len(dim_mults) - 1)
        if image_size % self.downsample_factor:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.downsample_factor}")
        if dim % NORM_GROUPS:
            raise ValueError(
                f"dim {dim} is not a multiple of {NORM_GROUPS}, the number of normalisation groups"
            )
        grid_size = image_size // self.downsample_factor
        self.image_size = image_size
        self.patch_size = self.downsample_factor
        self.num_tokens = grid_size**2
        self.layout = Layout((grid_size, grid_size))
        self.codebook_size = codebook_size
        dims = [dim * mult for mult in dim_mults]
        self.encoder = VQGANEncoder(
            dim=dim, dims=dims, depth=depth, latent_dim=latent_dim, codebook_dim=codebook_dim
        )
        self.quantizer = VQ(
            codebook_size,
            codebook_dim,
            commitment_cost=commitment_cost,
            entropy_cost=entropy_cost,
            use_l2_norm=use_l2_norm,
        )
        self.decoder = VQGANDecoder(
            dims=dims, depth=depth + 1, latent_dim=latent_dim, codebook_dim=codebook_dim
        )

    def encode_all(self, images: Tensor) -> Tokens:
        """See `ImageTokenizer.encode_all`; indices run row by row over the grid."""
        self.check_images(images)
        latents = self.encode_latents(images.to(self.dtype))
        indices = self.quantizer.codes_to_indices(rearrange(latents, "b c h w -> b (h w) c"))
        return Tokens(indices=indices, codebook_size=self.codebook_size, layout=self.layout)

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]."""
        self.check_tokens(tokens)
        codes = self.quantizer.indices_to_codes(tokens.data.to(self.device)).to(self.dtype)
        grid = rearrange(codes, "b (h w) c -> b c h w", h=self.image_size // self.downsample_factor)
        return self.decode_codes(grid).clamp(-1, 1)

    def encode_latents(self, images: Tensor) -> Tensor:
        """`images [b 3 H W]` in [-1, 1] of any size -> latents before quantisation, `[b codebook_dim h w]`.

        H and W are multiples of the downsampling factor.
        """
        return self.encoder(images)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """`codes [b codebook_dim h w]` of any grid -> images `[b 3 H W]` around [-1, 1], not clamped."""
        return self.decoder(codes)

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Training pass over `images [b 3 H W]` in [-1, 1]: reconstructions, not clamped, and quantised latents."""
        latents = self.encode_latents(images)
        height = latents.shape[2]
        quantized = self.quantizer.quantize(rearrange(latents, "b c h w -> b (h w) c"))
        codes = rearrange(quantized.codes.to(latents.dtype), "b (h w) c -> b c h w", h=height)
        return self.decode_codes(codes), quantized

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook


class VQGANEncoder(nn.Module):
    """Images in [-1, 1] -> latents at `1 / 2 ** (levels - 1)` of the resolution, before quantisation.

    Args: see `VQGAN`; `dims` are the channels of the levels.
    """

    def __init__(
        self, *, dim: int, dims: Sequence[int], depth: int, latent_dim: int, codebook_dim: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, dim, 3, padding=1)
        last = len(dims) - 1
        self.levels = nn.ModuleList(
            VQGANLevel(dim_in, dim_out, depth, with_attention=i == last)
            for i, (dim_in, dim_out) in enumerate(zip([dim, *dims[:-1]], dims, strict=True))
        )
        self.downsamples = nn.ModuleList(nn.Conv2d(dim_out, dim_out, 3, stride=2) for dim_out in dims[:-1])
        self.mid = _middle(dims[-1])
        self.norm_out = nn.GroupNorm(NORM_GROUPS, dims[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(dims[-1], latent_dim, 3, padding=1)
        self.to_codes = nn.Conv2d(latent_dim, codebook_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`[b 3 H W]` -> `[b codebook_dim h w]`."""
        hidden_states = self.levels[0](self.conv_in(images))
        for level, downsample in zip(self.levels[1:], self.downsamples, strict=True):
            hidden_states = F.pad(
                hidden_states, (0, 1, 0, 1)
            )  # right and bottom only, as the weights were trained
            hidden_states = level(downsample(hidden_states))
        hidden_states = self.mid(hidden_states)
        return self.to_codes(self.conv_out(F.silu(self.norm_out(hidden_states))))


class VQGANDecoder(nn.Module):
    """Codes -> images around [-1, 1] at `2 ** (levels - 1)` times the resolution.

    Args: see `VQGAN`; `dims` are the channels of the levels, full resolution first.
    """

    def __init__(self, *, dims: Sequence[int], depth: int, latent_dim: int, codebook_dim: int) -> None:
        super().__init__()
        self.from_codes = nn.Conv2d(codebook_dim, latent_dim, 1)
        self.conv_in = nn.Conv2d(latent_dim, dims[-1], 3, padding=1)
        self.mid = _middle(dims[-1])
        # Unlike the encoder's, levels run from the lowest resolution to the full one, as in the published weights.
        rising = dims[::-1]
        self.levels = nn.ModuleList(
            VQGANLevel(dim_in, dim_out, depth, with_attention=i == 0)
            for i, (dim_in, dim_out) in enumerate(zip([dims[-1], *rising[:-1]], rising, strict=True))
        )
        self.upsamples = nn.ModuleList(UpsampleConv(dim_out) for dim_out in rising[:-1])
        self.norm_out = nn.GroupNorm(NORM_GROUPS, dims[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(dims[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """`[b codebook_dim h w]` -> `[b 3 H W]`, not clamped."""
        hidden_states = self.levels[0](self.mid(self.conv_in(self.from_codes(codes))))
        for level, upsample in zip(self.levels[1:], self.upsamples, strict=True):
            hidden_states = level(upsample(hidden_states))
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class VQGANLevel(nn.Module):
    """Residual blocks at one resolution, each followed by attention where `with_attention` says so."""

    def __init__(self, dim_in: int, dim_out: int, depth: int, *, with_attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            VQGANResidualBlock(dim_out if i else dim_in, dim_out) for i in range(depth)
        )
        self.attentions = nn.ModuleList(
            VQGANAttention(dim_out) for _ in range(depth if with_attention else 0)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b dim_in h w]` -> `[b dim_out h w]`."""
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states)
        return hidden_states


class VQGANResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, added to the input, which a 1x1 convolution widens where needed."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, dim_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, dim_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b dim_in h w]` -> `[b dim_out h w]`."""
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.shortcut(hidden_states) + residual


class VQGANAttention(nn.Module):
    """Self-attention of one head over all positions of the grid, added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, dim, eps=NORM_EPS)
        self.query = nn.Conv2d(dim, dim, 1)
        self.key = nn.Conv2d(dim, dim, 1)
        self.value = nn.Conv2d(dim, dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b dim h w]` -> `[b dim h w]`."""
        normed = self.norm(hidden_states)
        q, k, v = (
            rearrange(project(normed), "b d h w -> b 1 (h w) d")
            for project in (self.query, self.key, self.value)
        )
        attended = rearrange(attention(q, k, v), "b 1 (h w) d -> b d h w", h=hidden_states.shape[2])
        return hidden_states + self.out(attended)


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(VQGANResidualBlock(dim, dim), VQGANAttention(dim), VQGANResidualBlock(dim, dim))
