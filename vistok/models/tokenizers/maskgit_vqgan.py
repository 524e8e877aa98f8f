"""MaskGIT-VQGAN: the convolutional f16 autoencoder of MaskGIT (Chang et al. 2022, section 3).

TiTok uses it twice: its tokens are what stage 1 learns to predict, and its decoder turns TiTok's logit map into pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.models.layers.upsample import UpsampleConv
from vistok.models.quantizers.vq import VQ
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Layout, Tokens

NORM_GROUPS = 32
NORM_EPS = 1e-6


class MaskGITVQGAN(ImageTokenizer):
    """Images <-> a grid of code indices, one per `downsample_factor x downsample_factor` pixels.

    Args:
        image_size: pixels per side, a multiple of `2 ** (len(dim_mults) - 1)`.
        codebook_size: number of codes.
        codebook_dim: width of a code.
        commitment_cost: weight of the commitment loss.
        dim: base number of channels, a multiple of 32.
        dim_mults: channels of each level in units of `dim`, full resolution first; every further level halves it.
        depth: residual blocks per level.

    Raises:
        ValueError: `image_size` is not a multiple of the downsampling factor, or `dim` not one of 32.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 1024,
        codebook_dim: int = 256,
        commitment_cost: float = 0.25,
        dim: int = 128,
        dim_mults: Sequence[int] = (1, 1, 2, 2, 4),
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.downsample_factor = 2 ** (len(dim_mults) - 1)
        if image_size % self.downsample_factor:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.downsample_factor}")
        grid_size = image_size // self.downsample_factor
        self.image_size = image_size
        self.patch_size = self.downsample_factor
        self.num_tokens = grid_size**2
        self.layout = Layout((grid_size, grid_size))
        self.codebook_size = codebook_size
        self.encoder = VQGANEncoder(dim=dim, dim_mults=dim_mults, depth=depth, latent_dim=codebook_dim)
        self.quantizer = VQ(codebook_size, codebook_dim, commitment_cost=commitment_cost)
        self.decoder = VQGANDecoder(dim=dim, dim_mults=dim_mults, depth=depth, latent_dim=codebook_dim)

    def encode_all(self, images: Tensor) -> Tokens:
        """See `ImageTokenizer.encode_all`; indices run row by row over the grid."""
        indices = self.quantizer.codes_to_indices(self.encode_latents(images))
        return Tokens(indices=indices, codebook_size=self.codebook_size, layout=self.layout)

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]."""
        self.check_tokens(tokens)
        return self.decode_codes(self.quantizer.indices_to_codes(tokens.data.to(self.device))).clamp(-1, 1)

    def encode_latents(self, images: Tensor) -> Tensor:
        """`images [b 3 H W]` in [-1, 1] -> latents before quantisation, `[b n codebook_dim]`."""
        self.check_images(images)
        latents = self.encoder((images.to(self.dtype) + 1) / 2)  # the network takes [0, 1]
        return rearrange(latents, "b c h w -> b (h w) c")

    def decode_codes(self, codes: Tensor) -> Tensor:
        """`codes [b n codebook_dim]` -> images `[b 3 H W]` around [-1, 1], not clamped."""
        codes = rearrange(
            codes.to(self.dtype), "b (h w) c -> b c h w", h=self.image_size // self.downsample_factor
        )
        return self.decoder(codes) * 2 - 1  # the network makes [0, 1]

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook


class VQGANEncoder(nn.Module):
    """Images in [0, 1] -> latents at `1 / 2 ** (levels - 1)` of the resolution.

    Args: see `MaskGITVQGAN`; `latent_dim` is the number of output channels.
    """

    def __init__(self, *, dim: int, dim_mults: Sequence[int], depth: int, latent_dim: int) -> None:
        super().__init__()
        dims = _level_dims(dim, dim_mults)
        self.conv_in = nn.Conv2d(3, dim, 3, padding=1, bias=False)
        self.levels = nn.ModuleList(
            _residual_blocks(dim_in, dim_out, depth)
            for dim_in, dim_out in zip([dim, *dims[:-1]], dims, strict=True)
        )
        self.mid = _residual_blocks(dims[-1], dims[-1], depth)
        self.norm_out = nn.GroupNorm(NORM_GROUPS, dims[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(dims[-1], latent_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`[b 3 H W]` -> `[b latent_dim h w]`."""
        hidden_states = self.conv_in(images)
        for i, level in enumerate(self.levels):
            hidden_states = level(F.avg_pool2d(hidden_states, 2) if i else hidden_states)
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class VQGANDecoder(nn.Module):
    """Latents -> images in [0, 1] at `2 ** (levels - 1)` times the resolution.

    Args: see `MaskGITVQGAN`; `latent_dim` is the number of input channels.
    """

    def __init__(self, *, dim: int, dim_mults: Sequence[int], depth: int, latent_dim: int) -> None:
        super().__init__()
        dims = _level_dims(dim, dim_mults)
        self.conv_in = nn.Conv2d(latent_dim, dims[-1], 3, padding=1)
        self.mid = _residual_blocks(dims[-1], dims[-1], depth)
        # index 0 is the full resolution, as in the encoder; decoding runs from the last level to the first
        self.levels = nn.ModuleList(
            VQGANDecoderLevel(dim_in, dim_out, depth, upsample=i > 0)
            for i, (dim_in, dim_out) in enumerate(zip([*dims[1:], dims[-1]], dims, strict=True))
        )
        self.norm_out = nn.GroupNorm(NORM_GROUPS, dims[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(dims[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """`[b latent_dim h w]` -> `[b 3 H W]`, not clamped."""
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.levels):
            hidden_states = level(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class VQGANDecoderLevel(nn.Module):
    """Residual blocks at one resolution, then the step to twice of it (all levels but the full resolution)."""

    def __init__(self, dim_in: int, dim_out: int, depth: int, *, upsample: bool) -> None:
        super().__init__()
        self.blocks = _residual_blocks(dim_in, dim_out, depth)
        self.upsample = UpsampleConv(dim_out) if upsample else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b dim_in h w]` -> `[b dim_out 2h 2w]`, or `[b dim_out h w]` at the full resolution."""
        hidden_states = self.blocks(hidden_states)
        return hidden_states if self.upsample is None else self.upsample(hidden_states)


class VQGANResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice.

    Between equal widths the input is added. Where the width changes, a 1x1 convolution of the block's *own output* is
    added instead, as the released weights were trained; the input passes only through the block.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, dim_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, dim_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(dim_out, dim_out, 1, bias=False) if dim_in != dim_out else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b dim_in h w]` -> `[b dim_out h w]`."""
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return residual + (hidden_states if self.shortcut is None else self.shortcut(residual))


def _residual_blocks(dim_in: int, dim_out: int, depth: int) -> nn.Sequential:
    """`depth` blocks; the first one changes the width."""
    return nn.Sequential(*(VQGANResidualBlock(dim_out if i else dim_in, dim_out) for i in range(depth)))


def _level_dims(dim: int, dim_mults: Sequence[int]) -> list[int]:
    if dim % NORM_GROUPS:
        raise ValueError(f"dim {dim} is not a multiple of {NORM_GROUPS}, the number of normalisation groups")
    return [dim * mult for mult in dim_mults]
