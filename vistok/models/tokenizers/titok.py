"""TiTok: an image as 32 to 256 tokens of a sequence (Yu et al. 2024, "An Image is Worth 32 Tokens").

A transformer sees image patches and latent tokens; only the latents are kept and quantised. A second transformer fills
mask tokens from them. Three families were released:

- two-stage (the paper): the decoder predicts codes of a MaskGIT-VQGAN, whose decoder makes the pixels: `TiTok` with a
  `pixel_codebook_size`;
- single-stage: the decoder predicts pixels: `TiTok` without one;
- single-stage with continuous tokens: `TiTokVAE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from einops import einsum, rearrange
from torch import Tensor, nn

from vistok.kernels.attention import PackedMask, pack, unpack
from vistok.models.layers.blocks import PreNormBlock
from vistok.models.quantizers.base import QuantizerOutput
from vistok.models.quantizers.gaussian import DiagonalGaussian
from vistok.models.quantizers.vq import VQ
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.maskgit_vqgan import VQGANDecoder
from vistok.tokens import Tokens


class TiTok(ImageTokenizer):
    """TiTok with discrete tokens; two-stage if `pixel_codebook_size` is given, else single-stage.

    Args:
        image_size: pixels per side, a multiple of both patch sizes.
        num_tokens: latent tokens per image.
        encoder_patch_size, encoder_dim, encoder_depth, encoder_num_heads: the transformer that encodes.
        decoder_patch_size, decoder_dim, decoder_depth, decoder_num_heads: the transformer that decodes.
        codebook_size: number of codes.
        codebook_dim: width of a code.
        commitment_cost: weight of the commitment loss.
        use_l2_norm: compare and look up codes on the unit sphere.
        pixel_codebook_size: codes of the MaskGIT-VQGAN that a two-stage model decodes through.
        pixel_codebook_dim, pixel_dim, pixel_dim_mults, pixel_depth: that decoder's sizes, see `MaskGITVQGAN`.

    Raises:
        ValueError: sizes that do not divide each other.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        num_tokens: int = 32,
        encoder_patch_size: int = 16,
        encoder_dim: int = 1024,
        encoder_depth: int = 24,
        encoder_num_heads: int = 16,
        decoder_patch_size: int = 16,
        decoder_dim: int = 1024,
        decoder_depth: int = 24,
        decoder_num_heads: int = 16,
        codebook_size: int = 4096,
        codebook_dim: int = 12,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = True,
        pixel_codebook_size: int | None = None,
        pixel_codebook_dim: int = 256,
        pixel_dim: int = 128,
        pixel_dim_mults: Sequence[int] = (1, 1, 2, 2, 4),
        pixel_depth: int = 2,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = encoder_patch_size
        self.num_tokens = num_tokens
        self.codebook_size = codebook_size
        two_stage = pixel_codebook_size is not None
        self.encoder = TiTokEncoder(
            image_size=image_size,
            patch_size=encoder_patch_size,
            num_tokens=num_tokens,
            dim=encoder_dim,
            depth=encoder_depth,
            num_heads=encoder_num_heads,
            to_latents=(MixingLinear if two_stage else nn.Linear)(encoder_dim, codebook_dim),
        )
        self.quantizer = VQ(
            codebook_size, codebook_dim, commitment_cost=commitment_cost, use_l2_norm=use_l2_norm
        )
        self.decoder = TiTokDecoder(
            image_size=image_size,
            patch_size=decoder_patch_size,
            num_tokens=num_tokens,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            latent_dim=codebook_dim,
            head=PatchHead(decoder_dim, decoder_patch_size)
            if pixel_codebook_size is None
            else LogitHead(decoder_dim, pixel_codebook_size),
        )
        _init_weights(self.encoder)
        _init_weights(self.decoder)
        self.pixel_decoder: nn.Module = nn.Identity()
        if pixel_codebook_size is not None:
            if decoder_patch_size != 2 ** (len(pixel_dim_mults) - 1):
                raise ValueError(
                    f"decoder_patch_size {decoder_patch_size} needs a pixel decoder that enlarges as much, but "
                    f"{len(pixel_dim_mults)} levels enlarge by {2 ** (len(pixel_dim_mults) - 1)}"
                )
            self.pixel_decoder = PixelDecoder(
                codebook_size=pixel_codebook_size,
                codebook_dim=pixel_codebook_dim,
                dim=pixel_dim,
                dim_mults=pixel_dim_mults,
                depth=pixel_depth,
            )

    def encode_all(self, images: Tensor) -> Tokens:
        """See `ImageTokenizer.encode_all`."""
        indices = self.quantizer.codes_to_indices(self.encode_latents(images))
        return Tokens(indices=indices, codebook_size=self.codebook_size)

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]."""
        self.check_tokens(tokens)
        return self.decode_codes(self.quantizer.indices_to_codes(tokens.data.to(self.device))).clamp(-1, 1)

    def encode_latents(self, images: Tensor) -> Tensor:
        """`images [b 3 H W]` in [-1, 1] -> latents before quantisation, `[b n codebook_dim]`."""
        self.check_images(images)
        return self.encoder(images.to(self.dtype))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """`codes [b n codebook_dim]` -> images `[b 3 H W]` around [-1, 1], not clamped.

        `decoder(codes)` alone gives the logit map of a two-stage model, or an image around [0, 1].
        """
        return self.pixel_decoder(self.decoder(codes.to(self.dtype))) * 2 - 1

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Training pass: `images [b 3 H W]` -> (reconstruction `[b 3 H W]`, not clamped, codes and their losses)."""
        quantized = self.quantizer.quantize(self.encode_latents(images))
        return self.decode_codes(quantized.codes), quantized

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook


class TiTokVAE(ImageTokenizer):
    """Single-stage TiTok with continuous tokens, drawn from a Gaussian posterior.

    Args:
        latent_dim: width of a token.
        Others as for `TiTok`.

    Raises:
        ValueError: sizes that do not divide each other.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        num_tokens: int = 32,
        encoder_patch_size: int = 16,
        encoder_dim: int = 1024,
        encoder_depth: int = 24,
        encoder_num_heads: int = 16,
        decoder_patch_size: int = 16,
        decoder_dim: int = 1024,
        decoder_depth: int = 24,
        decoder_num_heads: int = 16,
        latent_dim: int = 16,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = encoder_patch_size
        self.num_tokens = num_tokens
        self.codebook_size = None
        self.encoder = TiTokEncoder(
            image_size=image_size,
            patch_size=encoder_patch_size,
            num_tokens=num_tokens,
            dim=encoder_dim,
            depth=encoder_depth,
            num_heads=encoder_num_heads,
            to_latents=nn.Linear(encoder_dim, 2 * latent_dim),
        )
        self.decoder = TiTokDecoder(
            image_size=image_size,
            patch_size=decoder_patch_size,
            num_tokens=num_tokens,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            latent_dim=latent_dim,
            head=PatchHead(decoder_dim, decoder_patch_size),
        )
        _init_weights(self.encoder)
        _init_weights(self.decoder)

    def encode_all(
        self, images: Tensor, *, generator: torch.Generator | None = None, sample: bool = True
    ) -> Tokens:
        """See `ImageTokenizer.encode_all`.

        Args:
            images: `[b 3 H W]` in [-1, 1].
            generator: a CPU generator for the posterior noise; the same seed gives the same tokens on every device.
            sample: draw from the posterior, as the published figures do; `False` takes its mode.
        """
        posterior = self.posterior(images)
        latents = posterior.sample(self._noise(posterior, generator)) if sample else posterior.mode
        return Tokens(latents=latents)

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]."""
        self.check_tokens(tokens)
        return self.decode_latents(tokens.data.to(self.device)).clamp(-1, 1)

    def encode_latents(self, images: Tensor) -> Tensor:
        """`images [b 3 H W]` in [-1, 1] -> parameters of the posterior, `[b n 2*latent_dim]`."""
        self.check_images(images)
        return self.encoder(images.to(self.dtype))

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """`images [b 3 H W]` in [-1, 1] -> the distribution of their tokens."""
        return DiagonalGaussian.from_parameters(self.encode_latents(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """`latents [b n latent_dim]` -> images `[b 3 H W]` around [-1, 1], not clamped."""
        return self.decoder(latents.to(self.dtype)) * 2 - 1

    def forward(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Training pass: `images [b 3 H W]` -> (reconstruction `[b 3 H W]` of a sample, not clamped, posterior)."""
        posterior = self.posterior(images)
        return self.decode_latents(posterior.sample(self._noise(posterior, generator))), posterior

    def _noise(self, posterior: DiagonalGaussian, generator: torch.Generator | None) -> Tensor:
        """Standard normal `[b n c]`, drawn on the CPU in the published order: channel by channel."""
        b, n, c = posterior.mean.shape
        noise = torch.randn(b, c, n, generator=generator)
        return noise.transpose(1, 2).to(posterior.mean.device)


class TiTokEncoder(nn.Module):
    """Images -> latents (section 3.2 of the paper).

    Args:
        to_latents: `[b n dim]` -> `[b n c]`, the projection that ends the encoder.
        Others as for `TiTok`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_tokens: int,
        dim: int,
        depth: int,
        num_heads: int,
        to_latents: nn.Linear,
    ) -> None:
        super().__init__()
        grid_size = _grid_size(image_size, patch_size)
        self.num_tokens = num_tokens
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.class_embed = _embedding(1, dim)
        self.pos_embed = _embedding(1 + grid_size**2, dim)  # row 0 belongs to the class token
        self.latent_tokens = _embedding(num_tokens, dim)
        self.latent_pos_embed = _embedding(num_tokens, dim)
        self.norm_in = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(PreNormBlock(dim, num_heads, 4 * dim) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.to_latents = to_latents

    def forward(self, images: Tensor) -> Tensor:
        """`images [b 3 H W]` in [-1, 1] -> `[b n c]`."""
        patches = rearrange(self.patch_embed((images + 1) / 2), "b d h w -> b (h w) d")  # [0, 1] inside
        class_token = self.class_embed.expand(len(images), 1, -1)
        patches = torch.cat([class_token, patches], dim=1) + self.pos_embed
        latents = (self.latent_tokens + self.latent_pos_embed).expand(len(images), -1, -1)
        hidden_states = self.norm_in(torch.cat([patches, latents], dim=1))  # [b 1+g*g+n d]
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.to_latents(self.norm_out(hidden_states[:, -self.num_tokens :]))


class TiTokDecoder(nn.Module):
    """Codes or latents -> what `head` makes of the filled mask tokens (section 3.2 of the paper).

    Args:
        latent_dim: width of a code.
        head: `[b d g g]` -> an image or a logit map.
        Others as for `TiTok`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_tokens: int,
        dim: int,
        depth: int,
        num_heads: int,
        latent_dim: int,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.grid_size = _grid_size(image_size, patch_size)
        self.from_latents = nn.Linear(latent_dim, dim)
        self.class_embed = _embedding(1, dim)
        self.mask_token = _embedding(1, 1, dim)
        self.pos_embed = _embedding(1 + self.grid_size**2, dim)  # row 0 belongs to the class token
        self.latent_pos_embed = _embedding(num_tokens, dim)
        self.norm_in = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(PreNormBlock(dim, num_heads, 4 * dim) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.head = head

    def forward(self, codes: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """`codes [b n latent_dim]` -> `[b v g g]` logits or `[b 3 H W]` around [0, 1], by the head.

        With `lengths`, only the first codes of each image count: the images are packed into one row, in which each sees
        itself alone, so the result is that of decoding them one by one.
        """
        b, n, _ = codes.shape
        if lengths is None:
            latents = self.from_latents(codes)
        else:
            latents = unpack(self.from_latents(pack(codes, lengths)), lengths, n)
        latents = latents + self.latent_pos_embed[:n]
        class_token = self.class_embed.expand(b, 1, -1)
        masks = self.mask_token.expand(b, self.grid_size**2, -1)
        patches = torch.cat([class_token, masks], dim=1) + self.pos_embed
        hidden_states = self.norm_in(torch.cat([patches, latents], dim=1))  # [b 1+g*g+n d]
        hidden_states = self._transform(hidden_states, lengths)
        patches = self.norm_out(hidden_states[:, 1 : 1 + self.grid_size**2])
        return self.head(rearrange(patches, "b (h w) d -> b d h w", h=self.grid_size))

    def _transform(self, hidden_states: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """All blocks, on `[b 1+g*g+n d]`; packed if the images have different `lengths`."""
        mask, counts = None, []
        if lengths is not None:
            counts = [1 + self.grid_size**2 + length for length in lengths]
            mask = PackedMask(tuple(counts))
            hidden_states = pack(hidden_states, counts)  # [1 sum(counts) d]
        for block in self.blocks:
            hidden_states = block(hidden_states, mask)
        return hidden_states if mask is None else unpack(hidden_states, counts)


class MixingLinear(nn.Linear):
    """A linear layer on the memory of `[b n d]` read as `[b d n]`.

    The first releases reshape here where one would expect a transposition, so every latent mixes values of several
    tokens. Their weights were trained like this.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[b n d]` -> `[b n c]`."""
        b, n, d = hidden_states.shape
        return super().forward(hidden_states.reshape(b, d, n).transpose(1, 2))


class PatchHead(nn.Module):
    """Features -> pixels: one patch per position, then a 3x3 convolution over the image."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.to_pixels = nn.Conv2d(dim, 3 * patch_size**2, 1)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """`[b d g g]` -> `[b 3 H W]` around [0, 1]."""
        p = self.patch_size
        pixels = rearrange(self.to_pixels(features), "b (p q c) h w -> b c (h p) (w q)", p=p, q=p)
        return self.smooth(pixels)


class LogitHead(nn.Sequential):
    """Features `[b d g g]` -> logits over the codes of the pixel codebook, `[b v g g]`."""

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__(nn.Conv2d(dim, 2 * dim, 1), nn.Tanh(), nn.Conv2d(2 * dim, codebook_size, 1))


class PixelDecoder(nn.Module):
    """Logit map -> image: the *expected* code at every position, through the MaskGIT-VQGAN decoder (section 3.3)."""

    def __init__(
        self, *, codebook_size: int, codebook_dim: int, dim: int, dim_mults: Sequence[int], depth: int
    ) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.decoder = VQGANDecoder(dim=dim, dim_mults=dim_mults, depth=depth, latent_dim=codebook_dim)

    def forward(self, logits: Tensor) -> Tensor:
        """`[b v g g]` -> `[b 3 H W]` around [0, 1]."""
        probabilities = logits.float().softmax(dim=1).to(logits.dtype)
        return self.decoder(einsum(probabilities, self.codebook.weight, "b v h w, v c -> b c h w"))


def _grid_size(image_size: int, patch_size: int) -> int:
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch_size}")
    return image_size // patch_size


def _embedding(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def _init_weights(part: nn.Module) -> None:
    """Linear and convolution weights normal with std 0.02, biases 0; fused q, k, v projections Xavier-uniform."""
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if name.endswith("attn.qkv"):
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# the transformer sizes of the paper: dim, depth, num_heads
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}


def transformer_sizes(encoder: str, decoder: str) -> dict[str, int]:
    parts = {"encoder": SIZES[encoder], "decoder": SIZES[decoder]}
    names = ("dim", "depth", "num_heads")
    return {
        f"{part}_{name}": size
        for part, sizes in parts.items()
        for name, size in zip(names, sizes, strict=True)
    }


TWO_STAGE = {"codebook_size": 4096, "codebook_dim": 12, "use_l2_norm": True, "pixel_codebook_size": 1024}
_SINGLE_STAGE = {"codebook_size": 8192, "codebook_dim": 64, "use_l2_norm": False}

# the released variants: class and constructor arguments; the letters are the sizes of encoder and decoder
PRESETS: dict[str, tuple[type[ImageTokenizer], dict[str, Any]]] = {
    "titok-l-32": (TiTok, {"num_tokens": 32, **transformer_sizes("large", "large"), **TWO_STAGE}),
    "titok-b-64": (TiTok, {"num_tokens": 64, **transformer_sizes("base", "base"), **TWO_STAGE}),
    "titok-s-128": (TiTok, {"num_tokens": 128, **transformer_sizes("small", "small"), **TWO_STAGE}),
    "titok-bl-64-vq8k": (TiTok, {"num_tokens": 64, **transformer_sizes("base", "large"), **_SINGLE_STAGE}),
    "titok-bl-128-vq8k": (TiTok, {"num_tokens": 128, **transformer_sizes("base", "large"), **_SINGLE_STAGE}),
    "titok-sl-256-vq8k": (TiTok, {"num_tokens": 256, **transformer_sizes("small", "large"), **_SINGLE_STAGE}),
    "titok-ll-32-vae-c16": (
        TiTokVAE,
        {"num_tokens": 32, **transformer_sizes("large", "large"), "latent_dim": 16},
    ),
    "titok-bl-64-vae-c16": (
        TiTokVAE,
        {"num_tokens": 64, **transformer_sizes("base", "large"), "latent_dim": 16},
    ),
    "titok-bl-128-vae-c16": (
        TiTokVAE,
        {"num_tokens": 128, **transformer_sizes("base", "large"), "latent_dim": 16},
    ),
}
