"""Goldens of LlamaGen's VQ tokenizers; `tests.golden_checks.llamagen` lists this check for the kind "vq"."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import Comparison, GoldenCase
from vistok.models import upstream
from vistok.models.quantizers.vq import VQ
from vistok.models.tokenizers.vqgan import VQGAN


@torch.no_grad()
def check(case: GoldenCase) -> Comparison:
    """Encoding, decoding, the quantizer with and without l2 normalisation, and its losses."""
    model = upstream.load("llamagen_vq", case.weights, case.config)
    assert isinstance(model, VQGAN)
    encoder_out: list[Tensor] = []
    model.encoder.conv_out.register_forward_hook(lambda module, arguments, output: encoder_out.append(output))
    latents = model.encode_latents(case.inputs["image"])
    grid = {"h": latents.shape[2], "w": latents.shape[3]}
    quantized = model.quantizer.quantize(rearrange(latents, "b c h w -> b (h w) c"))
    plain = _without_norm(model.quantizer).quantize(case_latents(case))
    quant = rearrange(quantized.codes, "b (h w) c -> b c h w", **grid)
    entry, by_ids = (
        _look_up(model, ids, grid) for ids in (case.inputs["codes"], quantized.indices.flatten())
    )
    found = {
        "intermediate/encoder_out": encoder_out[0],
        "intermediate/pre_quant": latents,
        "outputs/quant": quant,
        "outputs/ids": quantized.indices.flatten(),
        "outputs/recon": model.decode_codes(quant),
        "outputs/decode_code": model.decode_codes(by_ids),
        "outputs/codebook_entry": entry,
        "outputs/codes_decoded": model.decode_codes(entry),
        "outputs/nol2_ids": plain.indices.flatten(),
        "outputs/nol2_quant": rearrange(plain.codes, "b (h w) c -> b c h w", **grid),
        "outputs/train_losses_vq_commit_entropy_usage": _training_losses(model.quantizer, case),
    }
    comparison = Comparison()
    for name, expected in case.expected.items():
        if name in found:
            comparison.compare(name, found[name], expected)
    if tuple(case.inputs["codes_shape"].tolist()) != tuple(entry.shape):
        comparison.failures.append(
            f"codes_shape: {case.inputs['codes_shape'].tolist()}, not {list(entry.shape)}"
        )
    _compare_public(comparison, case)
    return comparison


def case_latents(case: GoldenCase) -> Tensor:
    """The recorded latents before quantisation, `[b n c]`."""
    return rearrange(case.intermediate["pre_quant"], "b c h w -> b (h w) c")


def _look_up(model: VQGAN, ids: Tensor, grid: dict[str, int]) -> Tensor:
    """Flat `ids [b*h*w]` -> codes `[b c h w]`."""
    return rearrange(model.quantizer.indices_to_codes(ids), "(b h w) c -> b c h w", **grid)


def _without_norm(quantizer: VQ) -> VQ:
    plain = VQ(quantizer.codebook_size, quantizer.codebook_dim, use_l2_norm=False)
    plain.load_state_dict(quantizer.state_dict())
    return plain


def _training_losses(quantizer: VQ, case: GoldenCase) -> Tensor:
    """Codebook, commitment and entropy loss, and the share of codes in use if the release counted it."""
    latents = case_latents(case)
    out = quantizer.quantize(latents)
    entropy = quantizer.entropy_cost * quantizer.entropy_loss(latents)
    usage = torch.tensor(0.0)
    if case.config["codebook_show_usage"]:
        # The release counts distinct entries of a buffer of recent indices, most of which are still zero here.
        recent = torch.cat([torch.zeros(1, dtype=torch.int64), out.indices.flatten()])
        usage = torch.tensor(len(recent.unique()) / quantizer.codebook_size)
    return torch.stack([out.codebook_loss, out.commitment_loss, entropy, usage])


def _compare_public(comparison: Comparison, case: GoldenCase) -> None:
    """`encode` and `decode`, on the largest square of the image, agree with the pieces above."""
    side = min(case.inputs["image"].shape[2:])
    model = upstream.load("llamagen_vq", case.weights, case.config | {"image_size": side})
    assert isinstance(model, VQGAN)
    images = case.inputs["image"][:, :, :side, :side].clamp(-1, 1)
    tokens = model.encode(images)
    latents = model.encode_latents(images)
    indices = model.quantizer.quantize(rearrange(latents, "b c h w -> b (h w) c")).indices
    codes = _look_up(model, indices.flatten(), {"h": latents.shape[2], "w": latents.shape[3]})
    comparison.compare("encode()", tokens.data, indices)
    comparison.compare("decode()", model.decode(tokens), model.decode_codes(codes).clamp(-1, 1))
