"""Goldens of the TiTok tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.models import upstream
from vistok.models.tokenizers.titok import TiTok, TiTokVAE
from vistok.tokens import Tokens

SEQUENCE = "b n c -> b c 1 n"  # the published layout of latents


@torch.no_grad()
def check_vq(case: GoldenCase) -> Comparison:
    """Encoding, losses and decoding of a model with discrete tokens, one or two stages."""
    model = upstream.load("titok", case.weights, case.config)
    assert isinstance(model, TiTok)
    latents = model.encode_latents(case.inputs["images"] * 2 - 1)
    quantized = model.quantizer.quantize(latents)
    loss_scale = 0.0 if case.config.get("finetune_decoder", True) else 1.0  # stage 2 freezes the quantiser
    given = case.inputs.get("tokens", quantized.indices).flatten(1)
    tokens = Tokens(indices=given, codebook_size=model.codebook_size)
    codes = model.quantizer.indices_to_codes(tokens.data)
    found = {
        "intermediate/pre_quant_latents": rearrange(latents, SEQUENCE),
        "intermediate/decoder_output_on_z_quantized": model.decoder(quantized.codes),
        "outputs/token_indices": quantized.indices[:, None],
        "outputs/z_quantized": rearrange(quantized.codes, SEQUENCE),
        "outputs/quantizer_loss": loss_scale * quantized.loss,
        "outputs/commitment_loss": loss_scale * quantized.commitment_loss,
        "outputs/codebook_loss": loss_scale * quantized.codebook_loss,
        "outputs/reconstruction": to_unit_range(model.decode_codes(quantized.codes)),
        "outputs/images_from_tokens": to_unit_range(model.decode_codes(codes)),
    }
    comparison = compare_all(case, found, required=("outputs/token_indices", "outputs/reconstruction"))
    # the public entry points agree with the pieces above
    images = case.inputs["images"] * 2 - 1
    comparison.compare("encode()", model.encode(images).data, quantized.indices)
    comparison.compare("decode()", model.decode(tokens), model.decode_codes(codes).clamp(-1, 1))
    return comparison


@torch.no_grad()
def check_vae(case: GoldenCase) -> Comparison:
    """Posterior and decoding of a model with continuous tokens."""
    model = upstream.load("titok", case.weights, case.config)
    assert isinstance(model, TiTokVAE)
    images = case.inputs["images"] * 2 - 1
    posterior = model.posterior(images)
    sample = posterior.sample(rearrange(case.inputs["posterior_noise"], "b c 1 n -> b n c"))
    found = {
        "intermediate/pre_quant_latents": rearrange(model.encode_latents(images), SEQUENCE),
        "outputs/posterior_mean": rearrange(posterior.mean, SEQUENCE),
        "outputs/posterior_logvar": rearrange(posterior.logvar, SEQUENCE),
        "outputs/posterior_std": rearrange(posterior.std, SEQUENCE),
        "outputs/posterior_mode": rearrange(posterior.mode, SEQUENCE),
        "outputs/posterior_sample": rearrange(sample, SEQUENCE),
        "outputs/posterior_kl": posterior.kl(),
        "outputs/reconstruction_from_mode": to_unit_range(model.decode_latents(posterior.mode)),
        "outputs/reconstruction_from_sample": to_unit_range(model.decode_latents(sample)),
    }
    comparison = compare_all(case, found, required=("outputs/posterior_mean", "outputs/posterior_logvar"))
    comparison.compare("encode()", model.encode(images, sample=False).data, posterior.mode)
    tokens = Tokens(latents=sample)
    comparison.compare("decode()", model.decode(tokens), model.decode_latents(sample).clamp(-1, 1))
    return comparison


def compare_all(case: GoldenCase, found: dict[str, Tensor], required: Sequence[str]) -> Comparison:
    """Compare those of `found` that the golden recorded; scalars were recorded as one-element vectors.

    A golden without the `required` tensors proves too little and fails.
    """
    comparison = Comparison()
    for name, expected in case.expected.items():
        if name in found:
            actual = found[name]
            comparison.compare(name, actual.reshape(expected.shape) if actual.ndim == 0 else actual, expected)
    comparison.failures += [f"the golden has no {name}" for name in required if name not in case.expected]
    return comparison


def to_unit_range(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], the range of the published models."""
    return (images + 1) / 2


CHECKS: dict[str, Check] = {"vq_two_stage": check_vq, "vq_single_stage": check_vq, "vae": check_vae}
