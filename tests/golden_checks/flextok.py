"""Goldens of the FlexTok tokenizers, their autoencoders and formulas."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks import flextok_ar
from tests.golden_checks.case import Check, Comparison, GoldenCase
from tests.golden_checks.titok import compare_all
from vistok.models import upstream
from vistok.models.quantizers.fsq import FSQ
from vistok.models.tokenizers import flow
from vistok.models.tokenizers.flextok import FlexTok, Registers
from vistok.models.tokenizers.flextok_blocks import time_features
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.tokens import Tokens


@torch.no_grad()
def check_tokenizer(case: GoldenCase) -> Comparison:
    """Encoding, the velocity network, sampling with every kind of guidance, and the images."""
    model = upstream.load("flextok", case.weights, case.config)
    assert isinstance(model, FlexTok)
    found = {**_encoded(model, case), **_velocities(model, case), **_sampled(model, case)}
    comparison = compare_all(case, found, required=("outputs/token_ids", "outputs/velocity_null"))
    tokens = model.encode(case.inputs["images"], sample=False)  # the public entry agrees with the pieces
    comparison.compare("encode()", tokens.data, case.outputs["token_ids"])
    return comparison


def _encoded(model: FlexTok, case: GoldenCase) -> dict[str, Tensor]:
    inputs = case.inputs
    runs = {
        "": model.encode_latents(inputs["images"]),
        "_sampled": model.encode_latents(inputs["images"], inputs["posterior_noise"]),
        "_small": model.encode_latents(inputs["images_small"]),
    }
    found = {}
    for suffix, latents in runs.items():
        codes = model.encoder(latents)
        quantized = model.quantizer.quantize(codes)
        found |= {
            f"outputs/vae_latents{suffix}": latents,
            f"intermediate/vae_latents{suffix}": latents,
            f"outputs/pre_fsq{suffix}": codes,
            f"outputs/quant{suffix}": quantized.codes,
            f"outputs/token_ids{suffix}": quantized.indices,
        }
    patches = model.encoder.patches(runs[""])
    patches_out, registers_out = model.encoder.transform(patches)
    rows = runs[""].shape[-2] // model.encoder.patches.patch_size
    return found | {
        "intermediate/enc_patches_in": rearrange(patches, "b (h w) d -> b h w d", h=rows),
        "intermediate/enc_patches_out": rearrange(patches_out, "b (h w) d -> b h w d", h=rows),
        "intermediate/enc_registers_out": registers_out,
    }


def _velocities(model: FlexTok, case: GoldenCase) -> dict[str, Tensor]:
    """Every velocity twice: from all registers, and from the compressed ones that sampling uses."""
    latents, times, ids = case.inputs["noised_latents"], case.inputs["timesteps"], case.outputs["token_ids"]
    decoder, batch_size, full = model.decoder, len(ids), model.num_tokens
    codes, modulations = model.quantizer.indices_to_codes(ids), decoder.modulations(times)
    kept = {f"keep{k}": torch.full((batch_size,), k) for k in (1, full // 2, full)}
    kept["keep_mixed"] = torch.tensor(case.config["mixed_keep"])
    null = Registers(decoder.null_vector.expand(batch_size, full, -1))
    found = {"outputs/velocity_null": decoder.velocity(latents, null, modulations)}
    _assert_same(
        found["outputs/velocity_null"],
        decoder.velocity(latents, decoder.null_registers(batch_size), modulations),
    )
    for name, lengths in kept.items():
        velocity = decoder.velocity(latents, Registers(decoder.embed_codes(codes, lengths)), modulations)
        compressed = decoder.kept_registers(codes[:, : int(lengths.max())], lengths)
        _assert_same(velocity, decoder.velocity(latents, compressed, modulations))
        found[f"outputs/velocity_{name}"] = velocity
        found |= _inside(model, f"{name}", latents, times, codes, lengths)
    if "noised_latents_small" in case.inputs:
        found |= _small_velocities(model, case)
    return found


def _assert_same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)


def _inside(
    model: FlexTok, name: str, latents: Tensor, times: Tensor, codes: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    decoder, rows = model.decoder, latents.shape[-2] // model.decoder.patches.patch_size
    patches, registers = decoder.patches(latents), decoder.embed_codes(codes, lengths)
    patches_out, registers_out = decoder.transform(patches, Registers(registers), decoder.modulations(times))
    return {
        f"intermediate/dec_patches_in_{name}": rearrange(patches, "b (h w) d -> b h w d", h=rows),
        f"intermediate/dec_patches_out_{name}": rearrange(patches_out, "b (h w) d -> b h w d", h=rows),
        f"intermediate/dec_register_tokens_in_{name}": registers,
        f"intermediate/dec_registers_out_{name}": registers_out,
        f"intermediate/dec_time_embedding_{name}": decoder.time(times),
    }


def _small_velocities(model: FlexTok, case: GoldenCase) -> dict[str, Tensor]:
    latents, decoder = case.inputs["noised_latents_small"], model.decoder
    half, times = model.num_tokens // 2, case.inputs["timesteps"][: len(case.inputs["noised_latents_small"])]
    codes = model.quantizer.indices_to_codes(case.outputs["token_ids_small"])
    registers = decoder.kept_registers(codes[:, :half], torch.full((len(latents),), half))
    velocity = decoder.velocity(latents, registers, decoder.modulations(times))
    return {f"outputs/velocity_small_keep{half}": velocity}


def _sampled(model: FlexTok, case: GoldenCase) -> dict[str, Tensor]:
    found = {}
    all_tokens = Tokens(indices=case.outputs["token_ids"], codebook_size=model.codebook_size)
    for name, lengths, steps, scale, is_normalized in case.config.get("samples", []):
        options: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "guidance_mode": "normalized" if is_normalized else "plain",
            "noise": case.inputs["initial_noise"],
        }
        tokens = all_tokens.keep(torch.tensor(lengths))
        latents = model.sample_latents(tokens, **options)
        found[f"outputs/latents_{name}"] = latents
        found[f"outputs/images_{name}"] = model.decode_latents(latents)
        _assert_same(model.decode(tokens, **options), found[f"outputs/images_{name}"].clamp(-1, 1))
    return found


@torch.no_grad()
def check_vae(case: GoldenCase) -> Comparison:
    """Posterior and decoding of an autoencoder alone."""
    model = upstream.load("flextok_vae", case.weights, case.config)
    assert isinstance(model, KLTokenizer)
    posterior = model.posterior(case.inputs["images"])
    found = {
        f"outputs/{name}": rearrange(getattr(posterior, name), "b h w c -> b c h w")
        for name in ("mean", "logvar", "std")
    }
    found |= {
        "outputs/kl": posterior.kl().sum(dim=(1, 2)),
        "outputs/sample": model.encode_latents(case.inputs["images"], case.inputs["posterior_noise"]),
        "outputs/decoded": model.decode_latents(case.inputs["latents"]),
    }
    return compare_all(case, found, required=("outputs/mean", "outputs/decoded"))


@torch.no_grad()
def check_formulas(case: GoldenCase) -> Comparison:
    """FSQ, time features, guidance over several steps and the noise levels of training, without weights."""
    inputs, config = case.inputs, case.config
    quantizer = FSQ(tuple(config["fsq_levels"]))
    quantized = quantizer.quantize(inputs["fsq_latents"])
    levels = flow.mode_noise_levels(inputs["rf_uniform"], config["mode_scale"])
    found = {
        "outputs/fsq_bounded": quantizer.bound(inputs["fsq_latents"]),
        "outputs/fsq_quant": quantized.codes,
        "outputs/fsq_tokens": quantized.indices,
        "outputs/fsq_codes": quantizer.indices_to_codes(inputs["fsq_indices"]),
        "outputs/cfg": _guided(case, flow.PlainGuidance()),
        "outputs/apg": _guided(case, flow.NormalizedGuidance(**config["apg"])),
        "outputs/rf_sigmas": levels,
        "outputs/rf_sigmas_logit_normal": flow.logit_normal_noise_levels(inputs["rf_normal"]),
        "outputs/rf_noised": flow.interpolate(inputs["rf_clean"], inputs["rf_noise"], levels),
        "outputs/rf_target": inputs["rf_noise"] - inputs["rf_clean"],
    }
    for name in (name for name in case.outputs if name.startswith("sinusoid_unit_maxt")):
        max_timestep = float(name.removeprefix("sinusoid_unit_maxt"))
        found[f"outputs/{name}"] = time_features(inputs["t_unit"], config["sinusoid_dim"], max_timestep)
    return compare_all(case, found, required=("outputs/fsq_tokens", "outputs/apg"))


def _guided(case: GoldenCase, guidance: flow.FlowGuidance) -> Tensor:
    """All steps in turn, with what the guidance remembers of the earlier ones."""
    steps = zip(case.inputs["pred_cond"], case.inputs["pred_uncond"], strict=True)
    return torch.stack([guidance(cond, uncond, case.config["guidance_scale"]) for cond, uncond in steps])


CHECKS: dict[str, Check] = {
    "tokenizer": check_tokenizer,
    "vae": check_vae,
    "formulas": check_formulas,
    **flextok_ar.CHECKS,
}
