"""The MaskGIT loop: predict every position, keep the surest predictions, mask the others again, repeat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.next_token import StepCallback
from vistok.decoding.streams import UniformSource
from vistok.models.generators.base import MaskedGenerator
from vistok.order import ConfidenceOrder


@dataclass(frozen=True)
class MaskedSamplingParams:
    """How masked positions are decided.

    Args:
        num_steps: forward steps; at least 1.
        choice_temperature: Gumbel noise at the start, on the choice of codes and of positions; it falls linearly and
            is 0 in the last step. 0 is greedy.
        softmax_annealing: divide the logits by a temperature that falls from 1.3 to 0.5.

    Raises:
        ValueError: a value outside its range.
    """

    num_steps: int = 8
    choice_temperature: float = 4.5
    softmax_annealing: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.choice_temperature < float("inf"):
            raise ValueError(
                f"choice_temperature must be at least 0, got {self.choice_temperature}; 0 decodes greedily"
            )

    def noise_at(self, step: int) -> float:
        """Factor of the Gumbel noise at `step`, counted from 0; it has already fallen once at step 0."""
        return self.choice_temperature * self._remaining(step)

    def softmax_temperature_at(self, step: int) -> float:
        """What the logits are divided by at `step`, counted from 0."""
        return 0.5 + 0.8 * self._remaining(step) if self.softmax_annealing else 1.0

    def _remaining(self, step: int) -> float:
        return 1 - (step + 1) / self.num_steps


@torch.inference_mode()
def generate_masked(
    model: MaskedGenerator,
    class_labels: Tensor,
    *,
    streams: UniformSource,
    sampling: MaskedSamplingParams | None = None,
    guidance: GuidanceSchedule | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Sample all tokens of a batch of images (Chang et al. 2022, section 3.2, with the noise of TiTok's release).

    A decided token never changes. Every row has the same number of masked positions at every step.

    Args:
        model: a masked generator.
        class_labels: `[b]` int64 in `[0, num_classes)`.
        streams: at each step one draw per position and code is taken from it, then one draw per position.
        sampling: number of steps, noise, annealing.
        guidance: scale per step; where it is 1.0 the unconditional branch is not computed.
        on_step: called after every step with the canvas; undecided positions hold `model.mask_token_id`.

    Returns:
        `[b n]` int64 with `n = model.num_tokens`.
    """
    sampling = sampling or MaskedSamplingParams()
    guidance = guidance or ConstantGuidance()
    order = ConfidenceOrder(model.num_tokens, steps=sampling.num_steps)
    class_labels = class_labels.to(model.device)
    shape = (len(class_labels), model.num_tokens)
    indices = torch.full(shape, model.mask_token_id, dtype=torch.int64, device=model.device)
    num_masked = model.num_tokens
    for step in range(order.num_steps):
        logits = predict(model, indices, class_labels, guidance.at(step, order.num_steps))  # [b n v]
        logits = logits / sampling.softmax_temperature_at(step)
        noise = sampling.noise_at(step)
        code_noise = gumbel(streams.uniform(model.num_tokens, model.codebook_size)).to(logits.device)
        proposed = (logits + noise * code_noise).argmax(dim=-1)  # [b n]
        # The confidence is the proposed code's logit, not its probability.
        confidence = logits.gather(-1, proposed[..., None])[..., 0]
        confidence = confidence + noise * gumbel(streams.uniform(model.num_tokens)).to(logits.device)
        is_masked = indices == model.mask_token_id
        num_masked = order.num_masked_after(step, num_masked)
        least_sure = confidence.masked_fill(~is_masked, float("inf")).topk(num_masked, largest=False).indices
        indices = torch.where(is_masked, proposed, indices).scatter(1, least_sure, model.mask_token_id)
        if on_step is not None:
            on_step(step, indices)
    return indices


def predict(model: MaskedGenerator, indices: Tensor, class_labels: Tensor, guidance_scale: float) -> Tensor:
    """Guided float32 logits `[b n v]`; both branches go through the model as one batch."""
    if guidance_scale == 1.0:
        return model(indices, class_labels).float()
    labels = torch.cat([class_labels, torch.full_like(class_labels, model.null_label)])
    cond, uncond = model(indices.repeat(2, 1), labels).float().chunk(2)
    return apply_guidance(cond, uncond, guidance_scale)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform draws in [0, 1)."""
    return -(-uniforms.clamp_min(1e-20).log()).clamp_min(1e-20).log()
