"""ConvTiTok: our small 1D tokenizer in the manner of TiTok (Yu et al. 2024), for low resolutions.

As in TiTok, latent tokens and image patches attend to each other, the latents alone are kept and quantised, and a
decoder fills mask tokens from them. Different from TiTok, a convolutional stem and head (pixel-unshuffle, residual
blocks, pixel-shuffle) replace the linear patch embedding, the codes are FSQ, and there is no pixel decoder.

Any prefix of the tokens can be decoded: a learned vector stands for each token that is not there (as in FlexTok,
Bachmann et al. 2025, section 3). How good short prefixes look depends on the share of them in training (`tail_drop`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.models.layers.blocks import PreNormBlock
from vistok.models.quantizers.base import QuantizerOutput
from vistok.models.quantizers.fsq import FSQ
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens

STEM_PATCH = 4  # pixel-unshuffle factor of stem and head; one more stride-2 step leads to the patches
PATCH_SIZE = 2 * STEM_PATCH


class ConvTiTok(ImageTokenizer):
    """A 1D tokenizer with a convolutional stem and head around two small transformers.

    Args:
        image_size: pixels per side, a multiple of 8.
        num_tokens: latent tokens per image.
        levels: FSQ levels; the codebook is their product.
        dim: transformer width.
        encoder_depth: transformer blocks of the encoder.
        decoder_depth: transformer blocks of the decoder.
        num_heads: attention heads.
        conv_dim: channels of the residual blocks at a quarter of the resolution.
        conv_depth: residual blocks in the stem and in the head.
    """

    _supports_gradient_checkpointing = False
    variable_length = True

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 64,
        num_tokens: int = 64,
        levels: tuple[int, ...] = (8, 8, 8, 8),
        dim: int = 192,
        encoder_depth: int = 3,
        decoder_depth: int = 3,
        num_heads: int = 3,
        conv_dim: int = 128,
        conv_depth: int = 2,
    ) -> None:
        super().__init__()
        if image_size % PATCH_SIZE:
            raise ValueError(f"image_size {image_size} is not a multiple of the patch size {PATCH_SIZE}")
        self.image_size = image_size
        self.patch_size = PATCH_SIZE
        self.num_tokens = num_tokens
        self.quantizer = FSQ(levels)
        self.codebook_size = self.quantizer.codebook_size
        self.encoder = ConvTiTokEncoder(
            grid_size=image_size // PATCH_SIZE,
            num_tokens=num_tokens,
            dim=dim,
            depth=encoder_depth,
            num_heads=num_heads,
            conv_dim=conv_dim,
            conv_depth=conv_depth,
            codebook_dim=self.quantizer.codebook_dim,
        )
        self.decoder = ConvTiTokDecoder(
            grid_size=image_size // PATCH_SIZE,
            num_tokens=num_tokens,
            dim=dim,
            depth=decoder_depth,
            num_heads=num_heads,
            conv_dim=conv_dim,
            conv_depth=conv_depth,
            codebook_dim=self.quantizer.codebook_dim,
        )

    def encode_all(self, images: Tensor) -> Tokens:
        """See `ImageTokenizer.encode_all`."""
        self.check_images(images)
        indices = self.quantizer.quantize(self.encoder(images.to(self.dtype))).indices
        return Tokens(indices=indices, codebook_size=self.codebook_size)

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]."""
        self.check_tokens(tokens)
        codes = self.quantizer.indices_to_codes(tokens.data.to(self.device)).to(self.dtype)
        codes = F.pad(codes, (0, 0, 0, self.num_tokens - codes.shape[1]))  # [b n c]
        return self.decoder(codes, tokens.token_counts.to(self.device)).clamp(-1, 1)

    def forward(self, images: Tensor, lengths: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Training pass: the decoder sees the first `lengths [b]` of all tokens of `images [b 3 H W]`.

        Returns:
            Reconstructions `[b 3 H W]`, not clamped, and the quantised latents of all tokens.
        """
        quantized = self.quantizer.quantize(self.encoder(images))
        return self.decoder(quantized.codes, lengths), quantized

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook


class ConvTiTokEncoder(nn.Module):
    """Images -> latents before quantisation."""

    def __init__(
        self,
        *,
        grid_size: int,
        num_tokens: int,
        dim: int,
        depth: int,
        num_heads: int,
        conv_dim: int,
        conv_depth: int,
        codebook_dim: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(STEM_PATCH),
            nn.Conv2d(3 * STEM_PATCH**2, conv_dim, 3, padding=1),
            *(ResidualBlock(conv_dim) for _ in range(conv_depth)),
            nn.Conv2d(conv_dim, dim, 3, stride=2, padding=1),
        )
        self.patch_position, self.latents = _positions(grid_size, num_tokens, dim)
        self.blocks = nn.ModuleList(PreNormBlock(dim, num_heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.to_codes = nn.Linear(dim, codebook_dim)

    def forward(self, images: Tensor) -> Tensor:
        """`[b 3 H W]` -> `[b n codebook_dim]`."""
        patches = rearrange(self.stem(images), "b d h w -> b (h w) d") + self.patch_position
        hidden_states = torch.cat(
            [patches, self.latents.expand(len(images), -1, -1).to(patches.dtype)], dim=1
        )
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.to_codes(self.norm(hidden_states[:, patches.shape[1] :]))


class ConvTiTokDecoder(nn.Module):
    """Codes -> images."""

    def __init__(
        self,
        *,
        grid_size: int,
        num_tokens: int,
        dim: int,
        depth: int,
        num_heads: int,
        conv_dim: int,
        conv_depth: int,
        codebook_dim: int,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.from_codes = nn.Linear(codebook_dim, dim)
        self.mask_tokens, self.latent_position = _positions(grid_size, num_tokens, dim)
        self.dropped_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(PreNormBlock(dim, num_heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(
            nn.Conv2d(dim, 4 * conv_dim, 3, padding=1),
            nn.PixelShuffle(2),
            *(ResidualBlock(conv_dim) for _ in range(conv_depth)),
            nn.Conv2d(conv_dim, 3 * STEM_PATCH**2, 3, padding=1),
            nn.PixelShuffle(STEM_PATCH),
        )

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The first `lengths [b]` of `codes [b n codebook_dim]` -> `[b 3 H W]`."""
        is_kept = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]  # [b n]
        latents = torch.where(is_kept[..., None], self.from_codes(codes), self.dropped_embedding)  # [b n d]
        latents = latents + self.latent_position
        hidden_states = torch.cat(
            [self.mask_tokens.expand(len(codes), -1, -1).to(latents.dtype), latents], dim=1
        )
        for block in self.blocks:
            hidden_states = block(hidden_states)
        patches = self.norm(hidden_states[:, : self.grid_size**2])
        patches = rearrange(patches, "b (h w) d -> b d h w", h=self.grid_size)
        return self.head(patches.contiguous(memory_format=torch.channels_last))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b c h w]` -> `[b c h w]`."""
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        return hidden_states + self.conv2(F.silu(self.norm2(residual)))


def _positions(grid_size: int, num_tokens: int, dim: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Position parameters of patches `[1 g*g d]` and tokens `[1 n d]`; tokens start evenly spread over the patches."""
    patches = torch.randn(1, grid_size**2, dim) * 0.02
    nearest = torch.linspace(0, grid_size**2 - 1, num_tokens).round().long()
    return nn.Parameter(patches), nn.Parameter(patches[:, nearest].clone())
