"""The next-token loop: prefill, then one sampled token after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.sampling import SamplingParams, sample
from vistok.decoding.streams import UniformSource
from vistok.models.generators.base import NextTokenGenerator
from vistok.order import RasterOrder

StepCallback = Callable[[int, Tensor], None]  # (step, indices [b n], decided up to and including the step)


@torch.inference_mode()
def generate_next_token(
    model: NextTokenGenerator,
    condition: Tensor,
    *,
    streams: UniformSource,
    sampling: SamplingParams | None = None,
    guidance: GuidanceSchedule | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Sample all tokens of a batch of images.

    Args:
        model: a next-token generator.
        condition: what the model is conditioned on, batch axis first; see the model's `prefill`.
        streams: one uniform draw per image and step is taken from it.
        sampling: how a token is drawn.
        guidance: scale per step; with a scale of 1.0 the unconditional branch is not computed at all.
        on_step: called after every step.

    Returns:
        `[b n]` int64 with `n = model.num_tokens`.
    """
    sampling, guidance = sampling or SamplingParams(), guidance or ConstantGuidance()
    batch_size = len(condition)
    is_guided = guidance.scale != 1.0
    if is_guided:
        condition = torch.cat([condition, model.null_condition(batch_size).to(condition.device)])
    order = RasterOrder(model.num_tokens)
    indices = torch.zeros(batch_size, model.num_tokens, dtype=torch.int64, device=model.device)
    cache = model.new_cache(len(condition))
    logits = model.prefill(condition.to(model.device), cache)  # [b v], or [2b v] when guided
    for step in range(order.num_steps):
        if is_guided:
            cond, uncond = logits.float().chunk(2)
            logits = apply_guidance(cond, uncond, guidance.at(step, order.num_steps))
        indices[:, step] = sample(logits, sampling, streams.uniform()).to(indices.device)
        if on_step is not None:
            on_step(step, indices)
        if step + 1 < order.num_steps:
            token = indices[:, step].repeat(2) if is_guided else indices[:, step]
            logits = model.step(token, cache)
    return indices
