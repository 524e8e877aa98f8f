"""Goldens of MAR: backbone, head, reverse steps, tables, training loss, whole runs with recorded noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import ATOL, Check, Comparison, GoldenCase
from vistok.decoding import mar_sampling
from vistok.decoding.guidance import apply_guidance, make_guidance
from vistok.decoding.mar_sampling import GuidedDenoiser, generate_mar, hidden_counts, make_plan
from vistok.models import upstream
from vistok.models.generators.mar import MAR, hide_tokens, masked_diffusion_loss, take
from vistok.models.heads.diffusion import Chain, DiffusionHead, full_chain
from vistok.training.masked import drop_labels

EVERY = 111  # the golden keeps every 111th entry of the tables of the full chain
TABLE_ATOL = (
    1e-9  # the release multiplies 1 - beta again, which loses digits where little of the token is left
)
LIKELIHOOD_ATOL = 1e-2  # of the likelihoods at timestep 0, ill-conditioned: float32 is 2e-3 off float64


class RecordedDraws:
    """Stands in for `ImageStreams`: the recorded draws in the order in which they were made."""

    def __init__(self, normals: list[Tensor]) -> None:
        self.normals = list(normals)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        draw = self.normals.pop(0)
        if draw.shape[1:] != shape:
            raise ValueError(f"the sampler asks for draws {list(shape)}, {list(draw.shape[1:])} come next")
        return draw.to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        raise ValueError(f"the sampler asks for uniform draws {list(shape)}, the golden has none")


def check(case: GoldenCase) -> Comparison:
    """Everything that a MAR golden records."""
    model = upstream.load("mar", case.weights, case.config)
    assert isinstance(model, MAR)
    comparison = Comparison()
    with torch.no_grad():
        _check_backbone(case, model, comparison)
        _check_head(case, model, comparison)
        _check_chains(case, model, comparison)
        _check_training(case, model, comparison)
        for run in case.config["runs"]:
            _check_run(case, model, run, comparison)
    return comparison


def make_head(steps: str, temperature: float = 1.0) -> tuple[DiffusionHead, int]:
    """The head and the number of denoising steps that a respacing such as `"8"` or `"6,0"` stands for."""
    shares = tuple(int(share) for share in steps.split(","))
    return DiffusionHead(temperature=temperature, shares=shares), sum(shares)


def compare_relative(
    comparison: Comparison, case: GoldenCase, found: Mapping[str, Tensor], atol: float = ATOL
) -> None:
    """What the golden recorded, to a tolerance relative to its largest value."""
    for name, actual in found.items():
        expected = case.expected[name]
        scale = float(expected.abs().max()) if expected.is_floating_point() else 1.0
        comparison.compare(name, actual, expected, atol=atol * scale)


def _grid(model: MAR, tokens: Tensor) -> Tensor:
    """`[b n c]` -> `[b c h w]`."""
    assert model.layout.grid is not None
    return rearrange(tokens, "b (h w) c -> b c h w", h=model.layout.grid[0])


def _check_backbone(case: GoldenCase, model: MAR, comparison: Comparison) -> None:
    latents = rearrange(case.inputs["latents"], "b c h w -> b (h w) c")
    labels, is_hidden = case.inputs["labels"], case.inputs["mask"].bool()
    decided = (~is_hidden).nonzero()[:, 1].reshape(len(latents), -1)
    found = {
        "outputs/patchified": latents,
        "outputs/unpatchified": _grid(model, latents),
        "outputs/encoder_out": model.encode(take(latents, decided), decided, labels),
        "outputs/decoder_out": model(latents, labels, is_hidden),
    }
    compare_relative(comparison, case, found)


def _check_head(case: GoldenCase, model: MAR, comparison: Comparison) -> None:
    noisy, times, conditions = (case.inputs[f"net_{name}"] for name in "xtc")
    half, channels = len(noisy) // 2, model.latent_dim
    plain = model.denoiser(noisy[:half].repeat(2, 1), times, conditions)
    cond, uncond = plain.chunk(2)
    noise = apply_guidance(cond[:, :channels], uncond[:, :channels], 2.5)
    guided = torch.cat([noise.repeat(2, 1), plain[:, channels:]], dim=1)
    found = {"outputs/net_out": model.denoiser(noisy, times, conditions), "outputs/net_cfg_out": guided}
    compare_relative(comparison, case, found)
    for row in range(half):  # what samples agrees with it; it takes one timestep for all rows
        if times[row] == times[half + row]:
            branches = conditions[[row, half + row]][:, None]
            predict = GuidedDenoiser(model.denoiser, branches, 2.5, [int(times[row])], 1)
            sampled = predict(noisy[row][None, None], float(times[row]))[0, 0]
            comparison.compare(f"GuidedDenoiser() of row {row}", sampled, guided[row])


def _check_chains(case: GoldenCase, model: MAR, comparison: Comparison) -> None:
    head, num_steps = make_head(case.config["num_sampling_steps"])
    for name, chain, every in (
        ("full", full_chain(), EVERY),
        ("respaced", head.chain(num_steps), 1),
    ):
        found = {f"intermediate/table_{name}_{key}": table[::every] for key, table in _tables(chain).items()}
        compare_relative(comparison, case, found, atol=TABLE_ATOL)
        indices = case.inputs[f"pstep_{name}_t"]
        noisy, conditions = case.inputs["net_x"], case.inputs["net_c"]
        prediction = model.denoiser(noisy, chain.timesteps[indices], conditions)
        step = chain.reverse(prediction, noisy, indices)
        std = (step.log_variance / 2).exp() * (indices > 0)[:, None]
        found = {
            f"outputs/pstep_{name}_mean": step.mean,
            f"outputs/pstep_{name}_log_variance": step.log_variance,
            f"outputs/pstep_{name}_sample": step.mean + std * case.inputs["pstep_noise"] * 0.9,
        }
        compare_relative(comparison, case, found)


def _tables(chain: Chain) -> dict[str, Tensor]:
    of_token, of_noised = chain.mean_factors
    first, second = chain.token_factors
    return {
        "timestep_map": chain.timesteps,
        "betas": chain.betas,
        "alphas_cumprod": chain.alpha_bars,
        "sqrt_recip_alphas_cumprod": first,
        "sqrt_recipm1_alphas_cumprod": second,
        "posterior_mean_coef1": of_token,
        "posterior_mean_coef2": of_noised,
        "posterior_log_variance_clipped": chain.posterior_log_variances,
    }


def _check_training(case: GoldenCase, model: MAR, comparison: Comparison) -> None:
    inputs, config = case.inputs, case.config
    latents = rearrange(inputs["latents"], "b c h w -> b (h w) c")
    labels = drop_labels(
        inputs["labels"], inputs["train_label_uniforms"], model.null_label, config["label_drop_prob"]
    )
    is_hidden = hide_tokens(inputs["train_orders"], float(inputs["train_mask_ratio"]))
    conditions = model(latents, labels, is_hidden)
    shape = (config["diffusion_batch_mul"], *latents.shape[:2])
    times, noise = inputs["train_t"].reshape(shape), inputs["train_noise"].reshape(*shape, -1)
    prediction = model.denoiser(model.head.noised(latents, noise, times), times, conditions)
    terms = model.head.loss_terms(prediction, latents.expand_as(noise), noise, times)
    loss = masked_diffusion_loss(model.train(), latents / model.latent_scale, labels, is_hidden, times, noise)
    model.eval()
    found = {
        "intermediate/train_mask": is_hidden.float(),
        "intermediate/train_z": conditions,
        "outputs/train_mse": terms.mse.flatten(),
        "outputs/train_loss": loss,
    }
    compare_relative(comparison, case, found)
    expected, at_zero = case.outputs["train_vb"], times.flatten() == 0
    likelihoods = torch.where(at_zero, terms.variational.flatten(), expected)
    divergences = torch.where(at_zero, expected, terms.variational.flatten())
    comparison.compare("outputs/train_vb", likelihoods, expected, atol=LIKELIHOOD_ATOL)
    comparison.compare("train_vb but for timestep 0", divergences, expected)


def _check_run(case: GoldenCase, model: MAR, run: Mapping[str, Any], comparison: Comparison) -> None:
    name, num_steps = run["name"], run["num_iter"]
    head, num_inference_steps = make_head(run["steps"], run["temperature"])
    guidance = make_guidance(run["cfg_schedule"], run["cfg"])
    orders, labels = case.inputs[f"{name}_orders"], case.inputs["labels"]
    canvases: list[Tensor] = []
    asked: list[Tensor] = []  # the conditions of each step

    def watched(denoiser: Any, conditions: Tensor, *rest: Any) -> GuidedDenoiser:
        asked.append(conditions)
        return GuidedDenoiser(denoiser, conditions, *rest)

    with mock.patch.object(mar_sampling, "GuidedDenoiser", watched):
        tokens = generate_mar(
            model,
            labels,
            streams=RecordedDraws(_recorded_noise(case, name, num_steps, len(labels))),
            num_steps=num_steps,
            num_inference_steps=num_inference_steps,
            head=head,
            guidance=guidance,
            orders=orders,
            on_step=lambda step, latents: canvases.append(latents * model.latent_scale),
        )
    hidden = hidden_counts(model.num_tokens, num_steps)
    plan = make_plan(model, len(labels), num_steps, orders, RecordedDraws([]))
    masks = torch.stack([hide_tokens(orders, count / model.num_tokens) for count in hidden])
    found = {
        f"outputs/{name}_tokens": _grid(model, tokens.data * model.latent_scale),
        f"intermediate/{name}_masks": masks.to(torch.uint8),
        f"intermediate/{name}_mask_len": torch.tensor(hidden),
        f"intermediate/{name}_step00_z": asked[0][: len(labels)].flatten(0, 1),
    }
    for step, (scale, span) in enumerate(zip(plan.scales(guidance), plan.spans, strict=True)):
        drawn = take(canvases[step], plan.sequence[:, slice(*span)]).flatten(0, 1)
        found |= {
            f"intermediate/{name}_step{step:02}_tokens": drawn,
            f"intermediate/{name}_step{step:02}_cfg": torch.tensor([scale]),
        }
    compare_relative(comparison, case, {key: found[key] for key in found if key in case.expected})


def _recorded_noise(case: GoldenCase, run: str, num_steps: int, batch_size: int) -> list[Tensor]:
    """Starting noise of every step and the noise of its chain, whose last is not used."""
    draws = []
    for step in range(num_steps):
        start, chain = (case.inputs[f"{run}_step{step:02}_{what}"] for what in ("init", "noise"))
        draws += [rearrange(draw, "(b k) c -> b k c", b=batch_size) for draw in (start, *chain[:-1])]
    return draws


CHECKS: dict[str, Check] = {"generator": check}
