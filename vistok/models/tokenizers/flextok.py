"""FlexTok: an image as 1 to 256 ordered tokens (Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token
Sequences of Flexible Length").

A convolutional autoencoder (`KLTokenizer`) makes latents of the image. A transformer resamples them into registers, each
of which sees the patches and the registers before it; they are quantised by FSQ. Any prefix of them conditions a
rectified-flow transformer that generates the latents: few tokens fix what the picture shows, more of them how it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vistok.kernels.attention import LastKeyRepeats
from vistok.models.finite import FirstBadStep
from vistok.models.quantizers.fsq import FSQ
from vistok.models.tokenizers import flow
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.flextok_blocks import (
    DecoderBlock,
    EncoderBlock,
    Packing,
    PatchEmbed,
    TimeEmbed,
    TransformerOptions,
    layer_norm,
    learned,
    linear,
    zero_linear,
)
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.models.tokenizers.noise import Generators, normal_noise
from vistok.tokens import Tokens


class FlowPrediction(NamedTuple):
    """Result of the training pass."""

    loss: Tensor  # scalar, mean squared error of the velocity
    velocity: Tensor  # [b c h w] as predicted
    target: Tensor  # [b c h w]: noise - latents
    indices: Tensor  # [b n] int64


class FlexTok(ImageTokenizer):
    """FlexTok.

    Args:
        image_size: pixels per side, a multiple of what a patch of latents covers.
        num_tokens: registers per image.
        levels: FSQ levels; the codebook is their product.
        latent_patch_size: latents per side of a patch.
        encoder_dim, encoder_depth: the transformer that encodes.
        decoder_dim, decoder_depth: the transformer that decodes.
        head_dim, mlp_ratio, gated_mlp, qkv_bias, proj_bias, mlp_bias, qk_norm, norm_eps: of the blocks of both.
        time_dim: number of time features.
        max_timestep: time is multiplied by `1000 / max_timestep` in the features.
        learned_null: the vector that stands for "no condition" is learned; else it is zero.
        latent_channels, vae_dims, vae_depth, vae_num_groups: the autoencoder, see `KLTokenizer`.
        scaling_factor: what its latents are multiplied by. Published files carry it; without one, nothing can be
            encoded or decoded.
        sample_posterior: whether `encode` draws the latents from the autoencoder's posterior, as the class of the
            release does by default, or takes its mode.

    Raises:
        ValueError: sizes that do not divide each other.
    """

    _supports_gradient_checkpointing = False
    variable_length = True

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 256,
        num_tokens: int = 256,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        latent_patch_size: int = 2,
        encoder_dim: int = 1152,
        encoder_depth: int = 18,
        decoder_dim: int = 1152,
        decoder_depth: int = 18,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        gated_mlp: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = True,
        norm_eps: float = 1e-5,
        time_dim: int = 256,
        max_timestep: float = 1000.0,
        learned_null: bool = True,
        latent_channels: int = 16,
        vae_dims: Sequence[int] = (128, 256, 512, 512),
        vae_depth: int = 2,
        vae_num_groups: int = 32,
        scaling_factor: float | None = None,
        sample_posterior: bool = True,
    ) -> None:
        super().__init__()
        self.vae = KLTokenizer(
            image_size=image_size,
            latent_channels=latent_channels,
            dims=vae_dims,
            depth=vae_depth,
            num_groups=vae_num_groups,
            scaling_factor=scaling_factor,
        ).requires_grad_(False)
        self.patch_size = self.vae.patch_size * latent_patch_size
        if image_size % self.patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of {self.patch_size}, the pixels of a patch of latents"
            )
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.quantizer = FSQ(tuple(levels))
        self.codebook_size = self.quantizer.codebook_size
        self.sample_posterior = sample_posterior
        options = TransformerOptions(
            head_dim, mlp_ratio, gated_mlp, qkv_bias, proj_bias, mlp_bias, qk_norm, norm_eps
        )
        self.encoder = FlexTokEncoder(
            patches=PatchEmbed(
                latent_channels, latent_patch_size, image_size // self.patch_size, encoder_dim
            ),
            num_tokens=num_tokens,
            codebook_dim=self.quantizer.codebook_dim,
            dim=encoder_dim,
            depth=encoder_depth,
            options=options,
        )
        self.decoder = FlexTokDecoder(
            patches=PatchEmbed(
                latent_channels, latent_patch_size, image_size // self.patch_size, decoder_dim
            ),
            num_tokens=num_tokens,
            codebook_dim=self.quantizer.codebook_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            options=options,
            time=TimeEmbed(decoder_dim, time_dim, max_timestep),
            learned_null=learned_null,
        )

    def to(self, *args: Any, **kwargs: Any) -> FlexTok:
        """As `Module.to`, but that the autoencoder keeps its dtype, float32, as its authors advise."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and getattr(self, "is_quantized", False):
            raise ValueError("a quantized FlexTok keeps its dtype: choose one before quantize_weights")
        for part in (self.encoder, self.quantizer, self.decoder):
            part.to(dtype=dtype)
        return super().to(device=device, non_blocking=non_blocking)  # type: ignore[misc]

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformers."""
        return self.decoder.mask_vector.dtype

    def encode_all(
        self, images: Tensor, *, sample: bool | None = None, generator: Generators = None
    ) -> Tokens:
        """See `ImageTokenizer.encode`.

        Args:
            images: `[b 3 H W]` in [-1, 1].
            sample: draw the latents from the autoencoder's posterior, or take its mode; `sample_posterior` by default.
            generator: of the draw, see `normal_noise`.
        """
        self.check_images(images)
        sample = self.sample_posterior if sample is None else sample
        noise = normal_noise(len(images), self.vae.latent_shape, generator) if sample else None
        latents = self.encoder(self.encode_latents(images, noise))
        indices = self.quantizer.quantize(latents).indices
        return Tokens(indices=indices, codebook_size=self.codebook_size)

    def decode(
        self,
        tokens: Tokens,
        *,
        num_inference_steps: int = 25,
        guidance_scale: flow.GuidanceScale = 7.5,
        guidance_mode: str = "normalized",
        generator: Generators = None,
        noise: Tensor | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Tensor:
        """See `ImageTokenizer.decode`; images are drawn, and clamped to [-1, 1]. `DECODING` has the published settings.

        Args:
            tokens: of this tokenizer, each image with its own length.
            num_inference_steps: evaluations of the decoder, twice as many with guidance.
            guidance_scale: how strongly the tokens steer, a number or a function of the time from 1 (noise) down to 0;
                the number 1.0 is off.
            guidance_mode: `"normalized"` or `"plain"`, see `flow`.
            generator: of the noise that the images start from, see `normal_noise`; by default it is the same for all.
            noise: that noise itself, `[b c h w]`.
            timesteps: times of the steps, see `flow.time_schedule`.
        """
        latents = self.sample_latents(
            tokens,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_mode=guidance_mode,
            noise=normal_noise(len(tokens), self.vae.latent_shape, generator) if noise is None else noise,
            timesteps=timesteps,
        )
        return self.decode_latents(latents).clamp(-1, 1)

    @torch.no_grad()
    def sample_latents(
        self,
        tokens: Tokens,
        *,
        noise: Tensor,
        num_inference_steps: int = 25,
        guidance_scale: flow.GuidanceScale = 7.5,
        guidance_mode: str = "normalized",
        timesteps: Sequence[float] | None = None,
    ) -> Tensor:
        """Latents `[b c h w]`, scaled, of `tokens`; arguments as for `decode`.

        Raises:
            ValueError: wrong tokens, noise or settings; a velocity that is not finite.
        """
        self.check_tokens(tokens)
        if noise.shape != (len(tokens), *self.vae.latent_shape):
            raise ValueError(
                f"noise must be {[len(tokens), *self.vae.latent_shape]}, got {list(noise.shape)}"
            )
        times = flow.time_schedule(num_inference_steps, timesteps)
        guidance = flow.make_flow_guidance(guidance_mode)
        modulations = self.decoder.modulations(torch.tensor(times, device=self.device))
        codes = self.quantizer.indices_to_codes(tokens.data.to(self.device))
        kept = self.decoder.kept_registers(codes, tokens.token_counts.to(self.device))
        null = self.decoder.null_registers(len(tokens))
        first_bad = FirstBadStep(len(tokens), len(times), self.device)

        def velocity(latents: Tensor, step: int) -> Tensor:
            now = modulations.at(step)
            if guidance_scale == 1.0:
                found = self.decoder.velocity(latents, kept, now).float()
            else:
                cond, uncond = self.decoder.velocities(latents, kept, null, now)
                scale = guidance_scale(times[step]) if callable(guidance_scale) else guidance_scale
                found = guidance(cond.float(), uncond.float(), scale)
            first_bad.note(step, found)
            return found

        latents = flow.euler(velocity, noise.to(self.device, torch.float32), times)
        first_bad.check(f"the decoder of {type(self).__name__}")
        return latents

    def encode_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """`images [b 3 H W]` -> scaled latents `[b c h w]`; the posterior's mode, or the draw of `noise [b c h w]`."""
        return self.vae.encode_latents(images, noise) * self._scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents `[b c h w]` -> images `[b 3 H W]` around [-1, 1], not clamped."""
        return self.vae.decode_latents(latents / self._scaling_factor)

    def forward(
        self,
        images: Tensor,
        *,
        lengths: Tensor,
        noise_levels: Tensor,
        noise: Tensor,
        is_null: Tensor | None = None,
        posterior_noise: Tensor | None = None,
    ) -> FlowPrediction:
        """Training pass (section 3 of the paper); the autoencoder is frozen.

        Args:
            images: `[b 3 H W]` in [-1, 1].
            lengths: tokens that the decoder sees, `[b]`; see `sample_lengths`.
            noise_levels: times in [0, 1], `[b]`; see `flow`.
            noise: `[b c h w]`.
            is_null: images whose condition is dropped for guidance, `[b]` boolean.
            posterior_noise: draw the autoencoder's latents with it, `[b c h w]`, instead of taking the mode.
        """
        with torch.no_grad():
            latents = self.encode_latents(images, posterior_noise)
        quantized = self.quantizer.quantize(self.encoder(latents))
        registers = self.decoder.embed_codes(quantized.codes, lengths)
        if is_null is not None:
            registers = torch.where(is_null[:, None, None], self.decoder.null_vector, registers)
        noisy = flow.interpolate(latents, noise, noise_levels)
        velocity = self.decoder.velocity(noisy, Registers(registers), self.decoder.modulations(noise_levels))
        target = noise - latents
        return FlowPrediction(F.mse_loss(velocity.float(), target), velocity, target, quantized.indices)

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook

    @property
    def _scaling_factor(self) -> float:
        if self.vae.scaling_factor is None:
            raise ValueError(
                "this FlexTok has no scaling_factor, without which its autoencoder cannot be used; published files "
                "carry it, and FlexTok(scaling_factor=...) sets it"
            )
        return self.vae.scaling_factor


def sample_lengths(
    num_images: int, num_tokens: int, mode: str = "uniform", generator: torch.Generator | None = None
) -> Tensor:
    """How many tokens each image keeps in training, `[b]` int64 in 1..num_tokens (nested dropout, section 3.1).

    Args:
        num_images: size of the batch.
        num_tokens: the most tokens an image has.
        mode: `"uniform"`; `"pow2"`, uniform over 1, 2, 4, ... up to `num_tokens`; or `"uniform_pow2"`, uniform and then
            raised to the next power of two.
        generator: of the draws.

    Raises:
        ValueError: an unknown mode, or `num_tokens` is no power of two where the mode needs one.
    """
    modes = ("uniform", "pow2", "uniform_pow2")
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r} of nested dropout; choose one of {', '.join(modes)}")
    if mode != "uniform" and num_tokens & (num_tokens - 1):
        raise ValueError(f"nested dropout {mode!r} needs a power of two as num_tokens, got {num_tokens}")
    if mode == "pow2":
        return 2 ** torch.randint(num_tokens.bit_length(), (num_images,), generator=generator)
    lengths = torch.randint(1, num_tokens + 1, (num_images,), generator=generator)
    if mode == "uniform":
        return lengths
    return torch.tensor([1 << (length - 1).bit_length() for length in lengths.tolist()], dtype=torch.int64)


class FlexTokEncoder(nn.Module):
    """Latents -> registers before quantisation. Patches see all patches, registers also the registers up to themselves.

    Args:
        patches: the embedding of patches.
        num_tokens: registers.
        codebook_dim: width of a code.
        dim, depth, options: of the transformer.
    """

    def __init__(
        self,
        *,
        patches: PatchEmbed,
        num_tokens: int,
        codebook_dim: int,
        dim: int,
        depth: int,
        options: TransformerOptions,
    ) -> None:
        super().__init__()
        self.norm_eps = options.norm_eps
        self.patches = patches
        self.registers = learned(num_tokens, dim)
        self.blocks = nn.ModuleList(EncoderBlock(dim, options) for _ in range(depth))
        self.to_codes = zero_linear(dim, codebook_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents `[b c h w]` -> `[b n codebook_dim]`."""
        return self.head(self.transform(self.patches(latents))[1])

    def transform(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches `[b p d]` -> patches `[b p d]` and registers `[b n d]` after the last block."""
        num_patches = patches.shape[1]
        registers = self.registers.to(patches.dtype).expand(len(patches), -1, -1)
        hidden_states = torch.cat([patches, registers], dim=1)  # [b p+n d]
        for block in self.blocks:
            hidden_states = block(hidden_states, num_patches)
        return hidden_states[:, :num_patches], hidden_states[:, num_patches:]

    def head(self, registers: Tensor) -> Tensor:
        """Registers `[b n d]` -> `[b n codebook_dim]`."""
        return self.to_codes(layer_norm(registers, self.norm_eps))


@dataclass
class Registers:
    """Register tokens of a batch, of which the last one may stand for several equal ones.

    Attributes:
        mask: what lets the last one count as so many, one for all blocks and steps.
    """

    hidden_states: Tensor  # [b n d]
    num_last: int = 1

    def __post_init__(self) -> None:
        self.mask = LastKeyRepeats(self.num_last) if self.num_last > 1 else None


class Modulations(NamedTuple):
    """Shifts, factors and gates of the whole decoder at some times; a factor is one more than the predicted scale."""

    blocks: list[Tensor]  # per block [part group t 1 d], see `DecoderBlock`
    head: Tensor  # [part t 1 d], shift and factor

    def at(self, index: int) -> Modulations:
        """Those of one time, which all images of a batch share."""
        now = slice(index, index + 1)
        return Modulations([block[:, :, now] for block in self.blocks], self.head[:, now])


class FlexTokDecoder(nn.Module):
    """Noisy latents, time and codes -> velocity (section 3.2 of the paper).

    A learned vector without a position stands for each token that is not there, another one for all tokens when there
    is no condition. Equal registers stay equal through all blocks, so sampling computes one of them (`kept_registers`,
    `null_registers`), whose key counts as often as it stands for.

    Args:
        patches: the embedding of patches.
        num_tokens: registers.
        codebook_dim: width of a code.
        dim, depth, options: of the transformer.
        time: the embedding of times.
        learned_null: whether the vector for "no condition" is learned or zero.
    """

    def __init__(
        self,
        *,
        patches: PatchEmbed,
        num_tokens: int,
        codebook_dim: int,
        dim: int,
        depth: int,
        options: TransformerOptions,
        time: TimeEmbed,
        learned_null: bool,
    ) -> None:
        super().__init__()
        self.norm_eps = options.norm_eps
        self.num_tokens = num_tokens
        self.patches = patches
        self.time = time
        self.from_codes = linear(codebook_dim, dim)
        self.positions = learned(num_tokens, dim)
        self.mask_vector = learned(dim)
        self.learned_null = learned(dim) if learned_null else None
        self.blocks = nn.ModuleList(DecoderBlock(dim, options) for _ in range(depth))
        self.block_modulations = nn.ModuleList(zero_linear(dim, 12 * dim) for _ in range(depth))
        self.head_modulation = zero_linear(dim, 2 * dim)
        self.to_patches = zero_linear(dim, patches.proj.in_features)

    @property
    def null_vector(self) -> Tensor:
        """What every register is when there is no condition, `[d]`."""
        return torch.zeros_like(self.mask_vector) if self.learned_null is None else self.learned_null

    def embed_codes(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The first `lengths [b]` of `codes [b n codebook_dim]` -> registers `[b n d]`."""
        is_kept = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]  # [b n]
        registers = self.from_codes(codes.to(self.from_codes.weight.dtype)) + self.positions[: codes.shape[1]]
        return torch.where(is_kept[..., None], registers, self.mask_vector.to(registers.dtype))

    def kept_registers(self, codes: Tensor, lengths: Tensor) -> Registers:
        """All registers of `codes [b n codebook_dim]`, `n <= num_tokens`; those beyond `n` as one token."""
        registers = self.embed_codes(codes, lengths)
        num_dropped = self.num_tokens - codes.shape[1]
        if num_dropped == 0:
            return Registers(registers)
        dropped = self.mask_vector.to(registers.dtype).expand(len(codes), 1, -1)
        return Registers(torch.cat([registers, dropped], dim=1), num_dropped)

    def null_registers(self, batch_size: int) -> Registers:
        """All registers of `batch_size` images without a condition, as one token."""
        return Registers(self.null_vector.expand(batch_size, 1, -1), self.num_tokens)

    def modulations(self, times: Tensor) -> Modulations:
        """Of `times [t]`."""
        embedded = F.silu(self.time(times))  # [t d]
        blocks = [
            rearrange(layer(embedded), "t (group part d) -> part group t 1 d", group=2, part=6)
            for layer in self.block_modulations
        ]
        head = rearrange(self.head_modulation(embedded), "t (part d) -> part t 1 d", part=2)
        is_scale = torch.tensor([0, 0, 0, 1, 0, 1], device=head.device, dtype=head.dtype)[
            :, None, None, None, None
        ]
        return Modulations([block + is_scale for block in blocks], head + is_scale[2:4, 0])

    def velocity(self, latents: Tensor, registers: Registers, modulations: Modulations) -> Tensor:
        """Noisy latents `[b c h w]` -> velocity `[b c h w]`; modulations of `b` times or of one."""
        patches, _ = self.transform(self.patches(latents), registers, modulations)
        return self.head(patches, modulations.head, latents.shape[-2:])

    def velocities(
        self, latents: Tensor, registers: Registers, null: Registers, modulations: Modulations
    ) -> tuple[Tensor, Tensor]:
        """The velocity `[b c h w]` with these registers, and the one with the `null_registers`, in one pass.

        The passes have no padding in common, but a sequence: see `Packing`.
        """
        patches, registers_now = self.patches(latents), registers.hidden_states
        sequence = (null.hidden_states.to(patches.dtype), patches, patches, registers_now.to(patches.dtype))
        packing = Packing(patches.shape[1], registers_now.shape[1], registers.mask, null.mask, is_guided=True)
        hidden_states = self._transform(torch.cat(sequence, dim=1), modulations, packing)
        both = hidden_states[:, 1 : 1 + 2 * patches.shape[1]]
        uncond, cond = (
            self.head(each, modulations.head, latents.shape[-2:]) for each in both.chunk(2, dim=1)
        )
        return cond, uncond

    def transform(
        self, patches: Tensor, registers: Registers, modulations: Modulations
    ) -> tuple[Tensor, Tensor]:
        """Embedded patches `[b p d]` and registers -> both after the last block, `[b p d]` and `[b n d]`."""
        packing = Packing(patches.shape[1], registers.hidden_states.shape[1], registers.mask)
        hidden_states = torch.cat([patches, registers.hidden_states.to(patches.dtype)], dim=1)
        hidden_states = self._transform(hidden_states, modulations, packing)
        return hidden_states[:, : packing.num_patches], hidden_states[:, packing.num_patches :]

    def _transform(self, hidden_states: Tensor, modulations: Modulations, packing: Packing) -> Tensor:
        for block, modulation in zip(self.blocks, modulations.blocks, strict=True):
            hidden_states = block(hidden_states, modulation, packing)
        return hidden_states

    def head(self, patches: Tensor, modulation: Tensor, size: Sequence[int]) -> Tensor:
        """Patches `[b p d]` after the last block -> `[b c h w]` of `size` (h, w)."""
        shift, factor = modulation
        patches = self.to_patches(torch.addcmul(shift, layer_norm(patches, self.norm_eps), factor))
        return self.patches.to_latents(patches, size)


# settings of `FlexTok.decode`: as documented with the models, and as used with the generators over their tokens
DECODING: dict[str, dict[str, Any]] = {
    "documented": {"num_inference_steps": 20, "guidance_scale": 7.5, "guidance_mode": "normalized"},
    "generators": {"num_inference_steps": 25, "guidance_scale": 7.5, "guidance_mode": "normalized"},
    "unguided": {"num_inference_steps": 25, "guidance_scale": 1.0},
}


def _sizes(encoder: int, decoder: int) -> dict[str, int]:
    """The rule of the paper: a transformer of depth n is 64 n wide, with n heads."""
    return {
        "encoder_dim": 64 * encoder,
        "encoder_depth": encoder,
        "decoder_dim": 64 * decoder,
        "decoder_depth": decoder,
    }


# the released variants: class and constructor arguments; the numbers are the depths, the suffix the training data
PRESETS: dict[str, tuple[type[ImageTokenizer], dict[str, Any]]] = {
    "flextok-d12-d12-in1k": (FlexTok, _sizes(12, 12)),
    "flextok-d18-d18-in1k": (FlexTok, _sizes(18, 18)),
    "flextok-d18-d28-in1k": (FlexTok, _sizes(18, 28)),
    "flextok-d18-d28-dfn": (FlexTok, _sizes(18, 28)),
}
