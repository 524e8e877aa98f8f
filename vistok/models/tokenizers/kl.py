"""A convolutional autoencoder with a Gaussian posterior as a tokenizer with continuous tokens on a grid.

The network is diffusers' `AutoencoderKL` (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models", section 3.1). FlexTok's are of this kind, with 4, 8 or 16 latent channels, and KL-16, whose latents MAR (Li et
al. 2024) and xAR (Ren et al. 2025) generate; it has attention at its lowest resolution in the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from torch import Tensor

from vistok.models.layers.upsample import UpsampleConv
from vistok.models.quantizers.gaussian import DiagonalGaussian
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.noise import Generators, normal_noise
from vistok.tokens import Layout, Tokens


class KLTokenizer(ImageTokenizer):
    """Images <-> latents on a grid, row by row.

    Args:
        image_size: pixels per side, a multiple of `2 ** (len(dims) - 1)`.
        latent_channels: channels of a latent.
        dims: channels per resolution; every level but the last halves height and width.
        depth: residual blocks per level of the encoder; the decoder has one more.
        num_groups: groups of the normalisations.
        mid_attention: attention over all positions between the residual blocks in the middle.
        encoder_attention, decoder_attention: levels with attention after every residual block, counted from the highest
            resolution, 0.
        quant_convs: 1x1 convolutions between the networks and the latents.
        scaling_factor: what models of these latents multiply them by. It is kept with the weights and not applied.

    Raises:
        ValueError: `image_size` does not fit `dims`, or attention is wanted at a level that does not exist.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        latent_channels: int = 16,
        dims: Sequence[int] = (128, 256, 512, 512),
        depth: int = 2,
        num_groups: int = 32,
        mid_attention: bool = True,
        quant_convs: bool = True,
        encoder_attention: Sequence[int] = (),
        decoder_attention: Sequence[int] = (),
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = 2 ** (len(dims) - 1)
        if image_size % self.patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of {self.patch_size}, the pixels of a latent"
            )
        self.image_size = image_size
        self.latent_channels = latent_channels
        self.scaling_factor = scaling_factor
        self.layout = Layout((image_size // self.patch_size,) * 2)
        self.num_tokens = (image_size // self.patch_size) ** 2
        self.codebook_size = None
        self.autoencoder = AutoencoderKL(
            down_block_types=_block_types("DownEncoderBlock2D", len(dims), encoder_attention),
            up_block_types=_block_types("UpDecoderBlock2D", len(dims), decoder_attention)[::-1],
            block_out_channels=tuple(dims),
            layers_per_block=depth,
            latent_channels=latent_channels,
            norm_num_groups=num_groups,
            sample_size=image_size,
            use_quant_conv=quant_convs,
            use_post_quant_conv=quant_convs,
            mid_block_add_attention=mid_attention,
        )
        for level in self.autoencoder.decoder.up_blocks:
            for upsampler in level.upsamplers or ():
                upsampler.interpolate, upsampler.conv = False, UpsampleConv(upsampler.channels)

    def encode_all(self, images: Tensor, *, sample: bool = False, generator: Generators = None) -> Tokens:
        """See `ImageTokenizer.encode`; the number of tokens is fixed.

        Args:
            images: `[b 3 H W]` in [-1, 1].
            sample: draw from the posterior; by default its mode is taken.
            generator: of the draw, see `normal_noise`.
        """
        self.check_images(images)
        noise = normal_noise(len(images), self.latent_shape, generator) if sample else None
        latents = rearrange(self.encode_latents(images, noise), "b c h w -> b (h w) c")
        return Tokens(latents=latents, layout=self.layout)

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]."""
        self.check_tokens(tokens)
        if tokens.data.shape[-1] != self.latent_channels:
            raise ValueError(
                f"these latents have {tokens.data.shape[-1]} channels, this tokenizer decodes {self.latent_channels}"
            )
        latents = rearrange(tokens.data.to(self.device), "b (h w) c -> b c h w", h=self.latent_shape[1])
        return self.decode_latents(latents).clamp(-1, 1)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Training pass over `images [b 3 H W]` in [-1, 1] with `noise [b c h w]` of their latents.

        Returns:
            Reconstructions `[b 3 H W]`, not clamped, and the posterior of the latents.
        """
        posterior = self.posterior(images)
        latents = posterior.sample(rearrange(noise, "b c h w -> b h w c"))
        return self.decode_latents(rearrange(latents, "b h w c -> b c h w")), posterior

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image's latents."""
        return (self.latent_channels, *(self.image_size // self.patch_size,) * 2)

    def encode_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """`images [b 3 H W]` -> latents `[b c h w]`: the posterior's mode, or the draw of `noise [b c h w]`."""
        posterior = self.posterior(images)
        if noise is None:
            return rearrange(posterior.mode, "b h w c -> b c h w")
        noise = rearrange(noise.to(posterior.mean), "b c h w -> b h w c")
        return rearrange(posterior.sample(noise), "b h w c -> b c h w")

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """`images [b 3 H W]` in [-1, 1], of any size -> the distribution of their latents `[b h w c]`.

        Autocast is switched off inside, as in the published models.
        """
        with torch.autocast(images.device.type, enabled=False):
            parameters = self.autoencoder.encode(images.to(self.dtype)).latent_dist.parameters
        return DiagonalGaussian.from_parameters(rearrange(parameters, "b c h w -> b h w c"))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """`latents [b c h w]` -> images `[b 3 H W]` around [-1, 1], not clamped; without autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.autoencoder.decode(latents.to(self.dtype)).sample


def _block_types(name: str, num_levels: int, attention: Sequence[int]) -> tuple[str, ...]:
    """diffusers' names of the levels from the highest resolution down, some of them with attention."""
    if not set(attention) <= set(range(num_levels)):
        raise ValueError(f"levels with attention must be in 0..{num_levels - 1}, got {list(attention)}")
    return tuple(f"Attn{name}" if level in attention else name for level in range(num_levels))


# the autoencoder of MAR and xAR, 16 channels at a sixteenth of the resolution
KL16: dict[str, Any] = {
    "latent_channels": 16,
    "dims": (128, 128, 256, 256, 512),
    "encoder_attention": (4,),
    "scaling_factor": 0.2325,
}

# the released autoencoders of FlexTok: class and constructor arguments
PRESETS: dict[str, tuple[type[ImageTokenizer], dict[str, Any]]] = {
    f"flextok-vae-c{channels}": (KLTokenizer, {"latent_channels": channels}) for channels in (4, 8, 16)
}
