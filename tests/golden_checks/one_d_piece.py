"""Goldens of the One-D-Piece tokenizers: encoding all tokens, decoding prefixes of them."""

from __future__ import annotations

import re

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from tests.golden_checks.titok import SEQUENCE, compare_all, to_unit_range
from vistok.models import upstream
from vistok.models.tokenizers.titok import TiTok
from vistok.tokens import Tokens


@torch.no_grad()
def check_tokenizer(case: GoldenCase) -> Comparison:
    """Encoding and losses, and the pictures of every recorded length, alone and together in one batch."""
    model = upstream.load("one_d_piece", case.weights, case.config)
    assert isinstance(model, TiTok)
    images = case.inputs["images"] * 2 - 1
    latents = model.encode_latents(images)
    quantized = model.quantizer.quantize(latents)
    found = {
        "intermediate/pre_quant_latents": rearrange(latents, SEQUENCE),
        "outputs/token_indices": quantized.indices[:, None],
        "outputs/z_quantized": rearrange(quantized.codes, SEQUENCE),
        "outputs/quantizer_loss": torch.tensor(0.0),  # stage 2 freezes the quantiser
        "outputs/commitment_loss": torch.tensor(0.0),
        "outputs/codebook_loss": torch.tensor(0.0),
    }
    given = case.inputs.get("tokens", quantized.indices).flatten(1)
    given_codes = model.quantizer.indices_to_codes(given)
    lengths = recorded_lengths(case)
    for length in lengths:
        codes = quantized.codes[:, :length]
        found[f"intermediate/decoder_output_len{length}"] = model.decoder(codes)
        found[f"outputs/reconstruction_len{length}"] = to_unit_range(model.decode_codes(codes))
        found[f"outputs/images_from_tokens_len{length}"] = to_unit_range(
            model.decode_codes(given_codes[:, :length])
        )
    longest = f"outputs/reconstruction_len{model.num_tokens}"
    comparison = compare_all(case, found, required=("outputs/token_indices", longest))
    comparison.compare("encode()", model.encode(images).data, quantized.indices)
    compare_decode(comparison, model, given, lengths, found)
    return comparison


def compare_decode(
    comparison: Comparison, model: TiTok, given: Tensor, lengths: list[int], found: dict[str, Tensor]
) -> None:
    """`decode` of all lengths in one batch against the pictures that were decoded length by length."""
    expected = [found[f"outputs/images_from_tokens_len{length}"] * 2 - 1 for length in lengths]
    tokens = Tokens(indices=given.repeat(len(lengths), 1), codebook_size=model.codebook_size)
    counts = torch.tensor(lengths).repeat_interleave(len(given))
    comparison.compare("decode()", model.decode(tokens.keep(counts)), torch.cat(expected).clamp(-1, 1))


def recorded_lengths(case: GoldenCase) -> list[int]:
    """The lengths whose pictures were recorded, the longest first."""
    found = (re.search(r"_len(\d+)$", name) for name in case.expected)
    return sorted({int(match[1]) for match in found if match}, reverse=True)


CHECKS: dict[str, Check] = {"tokenizer": check_tokenizer}
