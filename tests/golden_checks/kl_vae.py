"""Goldens of the KL-16 autoencoder: posterior, its draws, decoding."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.models import upstream
from vistok.models.quantizers.gaussian import DiagonalGaussian
from vistok.models.tokenizers.kl import KLTokenizer

ATOL = 2e-5  # as the golden's notes say


@torch.no_grad()
def check(case: GoldenCase) -> Comparison:
    """Everything that a golden of this system records, and that `encode` and `decode` agree with it."""
    model = upstream.load("kl_vae", case.weights, case.config)
    assert isinstance(model, KLTokenizer) and model.scaling_factor is not None
    inner = _recorded(model)
    images = case.inputs["image"]
    posterior = model.posterior(images)
    sample = model.encode_latents(images, case.inputs["posterior_noise"])
    scaled = sample * model.scaling_factor
    found = {"outputs/moments": model.autoencoder.quant_conv(inner["encoder_h"])}
    found |= {
        f"outputs/{name}": _grid(getattr(posterior, name)) for name in ("mean", "logvar", "std", "mode")
    }
    found |= {
        "outputs/kl": posterior.kl().sum(dim=(1, 2)),
        "outputs/sample": sample,
        "outputs/scaled_sample": scaled,
        "outputs/decode_latent": model.decode_latents(case.inputs["latent"]),
        "outputs/decode_scaled_sample": model.decode_latents(scaled / model.scaling_factor),
    }
    found |= _extreme(case)
    found |= {f"intermediate/{name}": inner[name] for name in inner}
    comparison = Comparison()
    for name, expected in case.expected.items():
        if name in found:
            # The divergence is a sum over all latents of an image, and as large.
            size = expected.abs().max().item() if name == "outputs/kl" else 1.0
            comparison.compare(name, found[name], expected, atol=ATOL * max(size, 1.0))
    _compare_public(comparison, model, case)
    return comparison


def _recorded(model: KLTokenizer) -> dict[str, Tensor]:
    """What parts of the network give, filled in when they run; as in the golden, the last call counts."""
    inner: dict[str, Tensor] = {}
    encoder, decoder = model.autoencoder.encoder, model.autoencoder.decoder
    parts = {
        "encoder_h": encoder,
        "decoder_mid_attn": decoder.mid_block.attentions[0],
    }
    if len(encoder.down_blocks) - 1 in model.config["encoder_attention"]:
        parts["encoder_last_level_attn0"] = encoder.down_blocks[-1].attentions[0]
    for name, part in parts.items():
        part.register_forward_hook(lambda module, args, output, name=name: inner.update({name: output}))
    return inner


def _extreme(case: GoldenCase) -> dict[str, Tensor]:
    if "extreme_moments" not in case.inputs:
        return {}
    moments = rearrange(case.inputs["extreme_moments"], "b c h w -> b h w c")
    posterior = DiagonalGaussian.from_parameters(moments)
    return {f"outputs/extreme_{name}": _grid(getattr(posterior, name)) for name in ("mean", "logvar", "std")}


def _grid(latents: Tensor) -> Tensor:
    return rearrange(latents, "b h w c -> b c h w")


def _compare_public(comparison: Comparison, model: KLTokenizer, case: GoldenCase) -> None:
    """`encode` and `decode` agree with the pieces, where the golden's images are of the model's size."""
    images = case.inputs["image"].clamp(-1, 1)
    if images.shape[2:] != (model.image_size, model.image_size):
        return
    tokens = model.encode(images)
    latents = model.encode_latents(images)
    comparison.compare("encode()", tokens.data, rearrange(latents, "b c h w -> b (h w) c"))
    comparison.compare("decode()", model.decode(tokens), model.decode_latents(latents).clamp(-1, 1))


CHECKS: dict[str, Check] = {"vae": check}
