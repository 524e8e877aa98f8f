"""The MaskGIT loop: predict every position, keep the surest predictions, mask the others again, repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.given import Given
from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.ordered import StepCallback
from vistok.decoding.sampling import LogitsProcessor
from vistok.decoding.streams import UniformSource, to_device
from vistok.models.finite import FirstBadStep
from vistok.models.generators.base import MaskedGenerator
from vistok.models.layers.context_cache import ContextCache, Evaluation
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


@torch.no_grad()
def generate_masked(
    model: MaskedGenerator,
    class_labels: Tensor,
    *,
    streams: UniformSource,
    sampling: MaskedSamplingParams | None = None,
    guidance: GuidanceSchedule | None = None,
    null_labels: Tensor | None = None,
    given: Given | None = None,
    logits_processor: LogitsProcessor | None = None,
    reuse: ContextReuse | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Sample all tokens of a batch of images (Chang et al. 2022, section 3.2, with the noise of TiTok's release).

    A decided token never changes. Without given tokens every row has the same number of masked positions at every step;
    with them a row's schedule is that of its own undecided positions.

    Context reuse (ReCAP) changes the result. After a full evaluation every layer keeps the keys and values of what was
    decided then; a cheap evaluation computes anew only the class and the positions that were undecided then, which see
    each other and what was kept. Which of these are decided next follows from all of their confidences, so that none can
    be left out, and a cheap evaluation saves the share of the tokens that was decided at the last full one: little at
    the beginning, more towards the end. `vistok.eval.context_reuse` measures how far it is off.

    Args:
        model: a masked generator.
        class_labels: `[b]` int64 in `[0, num_classes)`.
        streams: at each step one draw per position and code is taken from it, then one draw per position.
        sampling: number of steps, noise, annealing.
        guidance: scale per step; where it is 1.0 the unconditional branch is not computed.
        null_labels: `[b]` classes that guidance leads away from; "no class" by default.
        given: tokens that are not drawn and that all others see from the beginning.
        logits_processor: changes the guided logits of every step; after a cheap evaluation those of tokens decided
            before the last full one are 0.
        reuse: which evaluations reuse features of the context; none by default.
        on_step: called after every step with the canvas; undecided positions hold `model.mask_token_id`.

    Returns:
        `[b n]` int64 with `n = model.num_tokens`.

    Raises:
        ValueError: a label out of range; `given` does not fit; logits that are not finite.
    """
    sampling = sampling or MaskedSamplingParams()
    guidance = guidance or ConstantGuidance()
    null = torch.full_like(class_labels, model.null_label) if null_labels is None else null_labels
    for labels in (class_labels, null):
        _check_labels(model, labels)
    class_labels = class_labels.to(model.device)
    scales = [guidance.at(step, sampling.num_steps) for step in range(sampling.num_steps)]
    indices = _canvas(model, len(class_labels), given)
    counts = [
        _num_masked(row, sampling.num_steps) for row in (indices == model.mask_token_id).sum(dim=1).tolist()
    ]  # before the first and after every step, of each image
    most_masked = [max(of_images) for of_images in zip(*counts, strict=True)]
    num_masked = torch.tensor(counts, dtype=torch.int64, device=indices.device)
    num_masked = num_masked.reshape(len(indices), 1 + sampling.num_steps)
    backbone = Backbone(
        model, class_labels, null.to(model.device), scales, reuse or ContextReuse(period=1), most_masked
    )
    first_bad = FirstBadStep(len(indices), sampling.num_steps, indices.device)
    for step in range(sampling.num_steps):
        logits = backbone.logits(step, indices)  # [b n v]
        first_bad.note(step, logits)
        if logits_processor is not None:
            logits = logits_processor(logits)
        logits = logits / sampling.softmax_temperature_at(step)
        noise = sampling.noise_at(step)
        code_noise = gumbel(to_device(streams.uniform(model.num_tokens, model.codebook_size), logits.device))
        proposed = (logits + noise * code_noise).argmax(dim=-1)  # [b n]
        # The confidence is the proposed code's logit, not its probability.
        confidence = logits.gather(-1, proposed[..., None])[..., 0]
        place_noise = gumbel(to_device(streams.uniform(model.num_tokens), logits.device))
        confidence = confidence + noise * place_noise
        is_masked = indices == model.mask_token_id
        ranks = (
            confidence.masked_fill(~is_masked, float("inf")).argsort(dim=-1).argsort(dim=-1)
        )  # 0: least sure
        indices = torch.where(is_masked, proposed, indices)
        indices = indices.masked_fill(ranks < num_masked[:, step + 1, None], model.mask_token_id)
        if on_step is not None:
            on_step(step, indices)
    first_bad.check(type(model).__name__)
    return indices


def _check_labels(model: MaskedGenerator, labels: Tensor) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= model.null_label:
        raise ValueError(
            f"class labels must be in 0..{model.num_classes - 1}, or {model.null_label} for none; got {labels.tolist()}"
        )


def _canvas(model: MaskedGenerator, batch_size: int, given: Given | None) -> Tensor:
    """Where decoding begins: masks, and the tokens that are given; `[b n]`."""
    shape = (batch_size, model.num_tokens)
    masks = torch.full(shape, model.mask_token_id, dtype=torch.int64, device=model.device)
    if given is None:
        return masks
    given.check(*shape, model.codebook_size)
    return given.to(model.device).put(masks, torch.arange(model.num_tokens, device=model.device))


def _num_masked(num_undecided: int, num_steps: int) -> list[int]:
    """How many positions of an image are masked before the first step and after every one; with none to decide, none."""
    if num_undecided == 0:
        return [0] * (1 + num_steps)
    order = ConfidenceOrder(num_undecided, steps=num_steps)
    counts = [num_undecided]
    for step in range(num_steps):
        counts.append(order.num_masked_after(step, counts[-1]))
    return counts


def predict(
    model: MaskedGenerator, indices: Tensor, class_labels: Tensor, null_labels: Tensor, guidance_scale: float
) -> Tensor:
    """Guided float32 logits `[b n v]`; both branches go through the model as one batch."""
    if guidance_scale == 1.0:
        return model(indices, class_labels).float()
    labels = torch.cat([class_labels, null_labels])
    cond, uncond = model(indices.repeat(2, 1), labels).float().chunk(2)
    return apply_guidance(cond, uncond, guidance_scale)


class Backbone:
    """The logits of every step, from full evaluations and from cheap ones that reuse their context.

    Args:
        model: a masked generator.
        class_labels, null_labels: `[b]`, of both branches of guidance.
        scales: of guidance, at every step.
        reuse: which evaluations are full.
        most_masked: undecided positions of the image with the most of them, before every step.
    """

    def __init__(
        self,
        model: MaskedGenerator,
        class_labels: Tensor,
        null_labels: Tensor,
        scales: Sequence[float],
        reuse: ContextReuse,
        most_masked: Sequence[int],
    ) -> None:
        self.model = model
        self.labels = (class_labels, null_labels)
        self.scales = scales
        self.reuse = reuse
        self.most_masked = most_masked
        self.cache: ContextCache | None = None
        if reuse.period > 1:
            self.cache = model.new_cache(len(class_labels) * self._num_branches(0, len(scales)))
        self.live = torch.empty(0)  # [b k], positions undecided at the last full evaluation

    def logits(self, step: int, indices: Tensor) -> Tensor:
        """Guided float32 logits `[b n v]` for the canvas `[b n]` at `step`."""
        if self.cache is None:
            return predict(self.model, indices, *self.labels, self.scales[step])
        if not self.reuse.is_full(step):
            return self._cheap(step, indices, self.cache)
        # The unconditional branch is needed where a cheap evaluation before the next full one is guided.
        branches = self._num_branches(step, self.reuse.next_full(step))
        self.live = undecided(indices == self.model.mask_token_id, self.most_masked[step])
        return self._evaluate(step, indices, branches, self.cache.evaluate_all(branches * len(indices)))

    def _cheap(self, step: int, indices: Tensor, cache: ContextCache) -> Tensor:
        branches = self._num_branches(step, step + 1)
        live_logits = self._evaluate(
            step, indices, branches, cache.evaluate(self.live.repeat(branches, 1))
        )  # [b k v]
        logits = live_logits.new_zeros(len(indices), 1 + self.model.num_tokens, live_logits.shape[-1])
        slots = self.live[..., None].expand_as(live_logits)
        return logits.scatter(1, slots, live_logits)[:, :-1]  # the last one is of padding

    def _evaluate(self, step: int, indices: Tensor, branches: int, evaluation: Evaluation) -> Tensor:
        labels = torch.cat(self.labels[:branches])
        logits = self.model(indices.repeat(branches, 1), labels, evaluation).float()
        return apply_guidance(logits[: len(indices)], logits[len(indices) :], self.scales[step])

    def _num_branches(self, start: int, end: int) -> int:
        """How many branches the steps from `start` on, before `end`, need: one where guidance is off."""
        return 1 if all(scale == 1.0 for scale in self.scales[start:end]) else 2


def undecided(is_masked: Tensor, most: int) -> Tensor:
    """Where `is_masked [b n]`, by ascending position: `[b most]` int64; rows with fewer are padded with `n`."""
    positions = (~is_masked).to(torch.uint8).argsort(dim=1, stable=True)
    return positions.masked_fill(~is_masked.gather(1, positions), is_masked.shape[1])[:, :most]


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform draws in [0, 1)."""
    return -(-uniforms.clamp_min(1e-20).log()).clamp_min(1e-20).log()
