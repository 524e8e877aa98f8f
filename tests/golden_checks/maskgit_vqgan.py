"""Goldens of the MaskGIT-VQGAN autoencoder."""

from __future__ import annotations

import torch
from einops import rearrange

from tests.golden_checks.case import Check, Comparison, GoldenCase
from tests.golden_checks.titok import compare_all, to_unit_range
from vistok.models import upstream
from vistok.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.tokens import Tokens


@torch.no_grad()
def check(case: GoldenCase) -> Comparison:
    """Encoding and decoding, before and after the clamp."""
    model = upstream.load("maskgit_vqgan", case.weights, case.config)
    assert isinstance(model, MaskGITVQGAN)
    latents = model.encode_latents(case.inputs["images"] * 2 - 1)
    tokens = model.encode(case.inputs["images"] * 2 - 1)
    codes = model.quantizer.indices_to_codes(tokens.data)
    given = Tokens(
        indices=case.inputs.get("tokens", tokens.data), codebook_size=model.codebook_size, layout=model.layout
    )
    given_codes = model.quantizer.indices_to_codes(given.data)
    grid = dict(zip("hw", model.layout.grid or (), strict=True))
    found = {
        "intermediate/encoder_output": rearrange(latents, "b (h w) c -> b c h w", **grid),
        "intermediate/quantized_latents": rearrange(codes, "b (h w) c -> b c h w", **grid),
        "intermediate/decoder_output_unclamped": to_unit_range(model.decode_codes(codes)),
        "intermediate/images_from_tokens_unclamped": to_unit_range(model.decode_codes(given_codes)),
        "outputs/token_indices": tokens.data,
        "outputs/reconstruction": to_unit_range(model.decode(tokens)),
        "outputs/images_from_tokens": to_unit_range(model.decode(given)),
    }
    return compare_all(case, found, required=("outputs/token_indices", "outputs/reconstruction"))


CHECKS: dict[str, Check] = {"maskgit_vqgan": check}
