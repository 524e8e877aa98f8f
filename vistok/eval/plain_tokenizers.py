"""Tokenizers as one would first write them, with the weights of ours: what the optimised ones are compared with.

Attention is `softmax(q k^T) v` written out over a dense mask, convolutions at twice the resolution run over repeated
pixels, images of different lengths are decoded one by one, and FlexTok's decoder computes every register and every
modulation anew at each step, in two passes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, attention_backend
from vistok.models.layers.upsample import UpsampleConv
from vistok.models.tokenizers import flow
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.flextok import FlexTok, FlexTokDecoder, Registers
from vistok.models.tokenizers.flextok_blocks import EncoderBlock, layer_norm
from vistok.models.tokenizers.noise import normal_noise
from vistok.tokens import Tokens

FLEXTOK_STEPS = 25
FLEXTOK_GUIDANCE = 7.5


def plain_encode(tokenizer: ImageTokenizer, images: Tensor) -> Tokens:
    """All tokens of images `[b 3 H W]`."""
    with attention_backend("reference"):
        if isinstance(tokenizer, FlexTok):
            return _flextok_encode(tokenizer, images)
        return tokenizer.encode(images)


def plain_decode(tokenizer: ImageTokenizer, tokens: Tokens, num_steps: int = FLEXTOK_STEPS) -> Tensor:
    """Images `[b 3 H W]` of tokens; a decoder that draws takes `num_steps` and starts from its usual noise."""
    with attention_backend("reference"), _repeated_pixels(tokenizer):
        if isinstance(tokenizer, FlexTok):
            return _flextok_decode(tokenizer, tokens, num_steps)
        counts = tokens.token_counts.tolist()
        if len(set(counts)) <= 1:
            return tokenizer.decode(tokens)
        return torch.cat(
            [tokenizer.decode(tokens[row : row + 1].keep(count)) for row, count in enumerate(counts)]
        )


@contextlib.contextmanager
def _repeated_pixels(tokenizer: ImageTokenizer) -> Iterator[None]:
    """Inside the block, `UpsampleConv` is what its docstring says it is."""
    modules = cast(nn.Module, tokenizer).modules()
    convs = [module for module in modules if isinstance(module, UpsampleConv)]
    for conv in convs:
        conv.forward = functools.partial(_upsample, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def _upsample(conv: UpsampleConv, images: Tensor) -> Tensor:
    return nn.Conv2d.forward(conv, F.interpolate(images, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class PrefixCausalMask(AttentionMask):
    """Patches see patches, registers see patches and the registers up to themselves."""

    num_patches: int

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """See `AttentionMask.dense`."""
        positions = torch.arange(num_keys, device=device)
        is_patch = positions < self.num_patches
        return (is_patch | (positions <= positions[:, None]) & ~is_patch[:, None])[None, None]  # [1 1 q k]


def _flextok_encode(tokenizer: FlexTok, images: Tensor) -> Tokens:
    encoder = tokenizer.encoder
    noise = normal_noise(len(images), tokenizer.vae.latent_shape) if tokenizer.sample_posterior else None
    patches = encoder.patches(tokenizer.encode_latents(images, noise))
    registers = encoder.registers.expand(len(patches), -1, -1)
    hidden_states = torch.cat([patches, registers], dim=1)  # [b p+n d]
    mask = PrefixCausalMask(patches.shape[1])
    for module in encoder.blocks:
        block = cast(EncoderBlock, module)
        normed = layer_norm(hidden_states, block.norm_eps)
        hidden_states = hidden_states + block.attn(normed, mask)
        hidden_states = hidden_states + block.mlp(layer_norm(hidden_states, block.norm_eps))
    latents = encoder.head(hidden_states[:, patches.shape[1] :])
    indices = tokenizer.quantizer.quantize(latents).indices
    return Tokens(indices=indices, codebook_size=tokenizer.codebook_size)


def _flextok_decode(tokenizer: FlexTok, tokens: Tokens, num_steps: int) -> Tensor:
    """Two whole passes per step, all `num_tokens` registers in each."""
    decoder: FlexTokDecoder = tokenizer.decoder
    codes = tokenizer.quantizer.indices_to_codes(tokens.data)
    codes = F.pad(codes, (0, 0, 0, tokenizer.num_tokens - codes.shape[1]))  # [b num_tokens c]
    cond = Registers(decoder.embed_codes(codes, tokens.token_counts))
    uncond = Registers(decoder.null_vector.expand_as(cond.hidden_states))
    guidance = flow.NormalizedGuidance()
    times = flow.time_schedule(num_steps)

    def velocity(latents: Tensor, step: int) -> Tensor:
        now = torch.full((len(tokens),), times[step], device=latents.device)
        with_tokens, without = (
            decoder.velocity(latents, registers, decoder.modulations(now)).float()
            for registers in (cond, uncond)
        )
        return guidance(with_tokens, without, FLEXTOK_GUIDANCE)

    noise = normal_noise(len(tokens), tokenizer.vae.latent_shape).to(tokens.data.device)
    return tokenizer.decode_latents(flow.euler(velocity, noise, times)).clamp(-1, 1)
