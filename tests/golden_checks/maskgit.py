"""Goldens of the MaskGIT generators: logits, whole sampling runs, the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.decoding.guidance import make_guidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.models import upstream
from vistok.models.generators.maskgit import MaskGIT
from vistok.models.upstream.maskgit import sampling_settings
from vistok.training.masked import drop_labels, mask_tokens, masked_loss

SCHEDULE_ATOL = 2e-6  # the JSON rounds to six decimals


class RecordedUniforms:
    """Stands in for `ImageStreams`: the recorded draws of every step, in the order in which they were made."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = list(draws)

    def uniform(self, *shape: int) -> Tensor:
        draw = self.draws.pop(0)
        if draw.shape[1:] != shape:
            raise ValueError(f"the sampler asks for draws {list(shape)}, {list(draw.shape[1:])} come next")
        return draw


def recorded_uniforms(case: GoldenCase, run: str, num_steps: int, model: MaskGIT) -> RecordedUniforms:
    """The noise of one run; a run without recorded noise has none, so any draws do."""
    labels = case.inputs[f"{run}_labels"]
    if f"{run}_uniform_tokens" not in case.inputs:
        shape = (num_steps, len(labels), model.num_tokens)
        codes, positions = torch.full((*shape, model.codebook_size), 0.5), torch.full(shape, 0.5)
    else:
        codes = case.inputs[f"{run}_uniform_tokens"]
        positions = case.inputs[f"{run}_uniform_confidence"]
    return RecordedUniforms([draw for step in zip(codes, positions, strict=True) for draw in step])


def check(case: GoldenCase) -> Comparison:
    """Everything that a MaskGIT golden records."""
    model = upstream.load("maskgit", case.weights, case.config)
    assert isinstance(model, MaskGIT)
    comparison = Comparison()
    with torch.inference_mode():
        _check_forward(case, model, comparison)
        for run, published in case.config.get("sampling_runs", {}).items():
            _check_run(case, model, run, published, comparison)
        if "train_loss" in case.outputs:
            _check_training(case, model, comparison)
    return comparison


def _check_forward(case: GoldenCase, model: MaskGIT, comparison: Comparison) -> None:
    if "forward_ids" not in case.inputs:
        return
    indices, labels = case.inputs["forward_ids"], case.inputs["forward_labels"]
    null = torch.full_like(labels, model.null_label)
    comparison.compare(
        "outputs/forward_logits_cond", model(indices, labels), case.outputs["forward_logits_cond"]
    )
    comparison.compare(
        "outputs/forward_logits_uncond", model(indices, null), case.outputs["forward_logits_uncond"]
    )


def _check_run(
    case: GoldenCase, model: MaskGIT, run: str, published: Mapping[str, Any], comparison: Comparison
) -> None:
    settings = sampling_settings(published)
    sampling = MaskedSamplingParams(
        num_steps=settings["num_inference_steps"],
        choice_temperature=settings["choice_temperature"],
        softmax_annealing=settings["softmax_annealing"],
    )
    guidance = make_guidance(
        settings["guidance_schedule"], settings["guidance_scale"], settings["guidance_power"]
    )
    labels = case.inputs[f"{run}_labels"]
    canvases = [torch.full((len(labels), model.num_tokens), model.mask_token_id)]
    tokens = generate_masked(
        model,
        labels,
        streams=recorded_uniforms(case, run, sampling.num_steps, model),
        sampling=sampling,
        guidance=guidance,
        on_step=lambda step, indices: canvases.append(indices),
    )
    comparison.compare(f"outputs/{run}_tokens", tokens, case.outputs[f"{run}_tokens"])
    if (before := case.intermediate.get(f"{run}_ids_before_step")) is not None:
        comparison.compare(f"intermediate/{run}_ids_before_step", torch.stack(canvases[:-1]), before)
    is_zero_based = settings["guidance_schedule"] != "power-cosine"
    strengths = [
        guidance.at(step, sampling.num_steps) - (1.0 if is_zero_based else 0.0)
        for step in range(sampling.num_steps)
    ]
    _check_branches(case, model, run, torch.stack(canvases[:-1]), strengths, comparison)
    _check_schedule(case, model, run, canvases, strengths, sampling, comparison)


def _check_branches(
    case: GoldenCase,
    model: MaskGIT,
    run: str,
    canvases: Tensor,
    strengths: list[float],
    comparison: Comparison,
) -> None:
    """The logits of both branches on our own canvases. The release skips the unconditional one at strength 0."""
    if f"{run}_cond_logits" not in case.intermediate:
        return
    labels = case.inputs[f"{run}_labels"]
    null = torch.full_like(labels, model.null_label)
    used = torch.tensor([int(strength != 0) for strength in strengths])
    cond = torch.stack([model(indices, labels) for indices in canvases])
    uncond = torch.stack([model(indices, null) for indices in canvases]) * used[:, None, None, None]
    found = {"cond_logits": cond, "uncond_logits": uncond, "uncond_used": used}
    for name, actual in found.items():
        comparison.compare(f"intermediate/{run}_{name}", actual, case.intermediate[f"{run}_{name}"])


def _check_schedule(
    case: GoldenCase,
    model: MaskGIT,
    run: str,
    canvases: list[Tensor],
    strengths: list[float],
    sampling: MaskedSamplingParams,
    comparison: Comparison,
) -> None:
    """The table in the JSON: guidance and temperature, and the masked positions of every row."""
    rows = case.meta.get(f"schedule_{run}")
    if rows is None:
        return
    counts = [(indices == model.mask_token_id).sum(dim=-1) for indices in canvases]  # [b] each
    num_rows = len(counts[0])
    before = torch.tensor([[row["masked_before"]] * num_rows for row in rows])
    after = torch.tensor([[row["masked_after"]] * num_rows for row in rows])
    noise = [sampling.noise_at(step) for step in range(sampling.num_steps)]
    comparison.compare(f"schedule/{run}_masked_before", torch.stack(counts[:-1]), before)
    comparison.compare(f"schedule/{run}_masked_after", torch.stack(counts[1:]), after)
    for name, values in (("guidance", strengths), ("temperature", noise)):
        expected = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        actual = torch.tensor(values, dtype=torch.float64)
        comparison.compare(f"schedule/{run}_{name}", actual, expected, atol=SCHEDULE_ATOL)


def _check_training(case: GoldenCase, model: MaskGIT, comparison: Comparison) -> None:
    inputs, config = case.inputs, case.config
    masked, is_masked = mask_tokens(
        inputs["train_tokens"], inputs["train_timesteps"], inputs["train_rand"], model.mask_token_id
    )
    labels = drop_labels(
        inputs["train_labels"], inputs["train_label_rand"], model.null_label, config["class_label_dropout"]
    )
    logits = model(masked, labels)
    result = masked_loss(
        logits,
        inputs["train_tokens"],
        is_masked,
        label_smoothing=config["label_smoothing"],
        unmasked_weight=config["loss_weight_unmasked_token"],
    )
    found = {
        "masked_tokens": masked,
        "mask": is_masked,
        "logits": logits,
        "loss": result.loss.reshape(1),
        "accuracy": result.accuracy.reshape(1),
    }
    for name, actual in found.items():
        comparison.compare(f"outputs/train_{name}", actual, case.outputs[f"train_{name}"])


CHECKS: dict[str, Check] = {"vit": check, "uvit": check}
