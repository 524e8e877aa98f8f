"""The loop of xAR: one step of the order after the other, a flow integrated in each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.ordered import StepCallback
from vistok.decoding.step_schedules import steps_of_each
from vistok.decoding.streams import NormalSource, StepNoise
from vistok.models.finite import FirstBadStep
from vistok.models.generators.xar import XAR, Modulations
from vistok.models.heads.flow import FlowHead
from vistok.models.layers.kv_cache import KVCache
from vistok.tokens import Tokens

MODULATIONS_KEPT = 1024  # classes times times of a run; beyond, every call makes its own


@torch.no_grad()
def generate_flow(
    model: XAR,
    class_labels: Tensor,
    *,
    streams: NormalSource,
    num_inference_steps: int | Sequence[int] = 50,
    head: FlowHead | None = None,
    guidance: GuidanceSchedule | None = None,
    null_labels: Tensor | None = None,
    on_step: StepCallback | None = None,
) -> Tokens:
    """Sample the tokens of a batch of images (Ren et al. 2025, section 3.3).

    Args:
        model: a generator with a velocity.
        class_labels: `[b]` int64 in `[0, num_classes)`.
        streams: for every step of the order the starting noise is taken from it, then what the head needs.
        num_inference_steps: evaluations of the network at every step of the order, or at each of them, as
            `step_schedules` gives them.
        head: how a velocity becomes tokens; the model's own by default.
        guidance: scale per step of the order; where it is 1.0 the unconditional branch is not computed.
        null_labels: `[b]` classes that guidance leads away from; "no class" by default.
        on_step: called after every step of the order with the latents `[b n c]`; undecided ones are zero.

    Returns:
        Latents `[b n c]` float32 in storage order, not scaled: what the tokenizer decodes.

    Raises:
        ValueError: a label out of range, not one number of denoising steps per step of the order, or too few of them;
            tokens that are not finite.
    """
    head, guidance = head or model.head, guidance or ConstantGuidance()
    batch_size, plan = len(class_labels), [positions.to(model.device) for positions in model.order.plan()]
    counts = steps_of_each(num_inference_steps, len(plan))
    # All times that the network is asked for; it raises here where the steps are too few.
    times = {time for count in set(counts) for time in head.integrator.times(count)}
    scales = [guidance.at(step, len(plan)) for step in range(len(plan))]
    labels = model.both_branches(class_labels, null_labels)  # [2b]
    modulations = SharedModulations(model, labels, times)
    cache = model.new_cache(2 * batch_size)
    latents = torch.zeros(batch_size, model.num_tokens, model.latent_dim, device=model.device)
    first_bad = FirstBadStep(batch_size, len(plan), model.device)
    for step, positions in enumerate(plan):
        if all(scale == 1.0 for scale in scales[step:]):
            cache = cache.narrow(batch_size)  # nobody asks for the other branch any more
        context = latents[:, plan[step - 1]] if step else None
        velocity = StepVelocity(model, modulations, cache, context, scales[step])
        noise = StepNoise(streams, (len(positions), model.latent_dim), model.device)
        drawn = head.sample(velocity, noise, num_inference_steps=counts[step])  # [b k c]
        first_bad.note(step, drawn)
        latents[:, positions] = drawn.to(latents.dtype)
        if on_step is not None:
            on_step(step, latents / model.latent_scale)
    first_bad.check(type(model).__name__)
    return Tokens(latents=latents / model.latent_scale, layout=model.layout)


class SharedModulations:
    """The modulations of a run, made once for every class and time that occur in it.

    All steps of an order walk through the same times, and what is decided has time 0; so most calls of the network need
    what an earlier one, or another image of the same class, has needed.

    Args:
        model: the network.
        labels: `[r]` int64, of all rows.
        times: that steps of the order can have.
    """

    def __init__(self, model: XAR, labels: Tensor, times: Collection[float]) -> None:
        self.model = model
        self.classes, self.rows = labels.unique(return_inverse=True)  # [u], [r]
        self.columns = {time: column for column, time in enumerate(times)}
        self.times = torch.tensor(list(times), dtype=torch.float32, device=labels.device)  # [t]
        self.kept: Tensor | None = None
        if len(self.classes) * len(times) <= MODULATIONS_KEPT:
            self.kept = torch.stack(self._of_classes(self.times))  # [blocks u t 6d]

    def at(self, times: Sequence[float], num_rows: int) -> Modulations:
        """Those of the first `num_rows` rows, for steps at these times."""
        rows, columns = self.rows[:num_rows], [self.columns[time] for time in times]
        if self.kept is None:
            asked = torch.stack([self.times[column] for column in columns])
            return [of_block[rows] for of_block in self._of_classes(asked)]
        found = [self.kept[:, :, column : column + 1][:, rows] for column in columns]  # [blocks r 1 6d] each
        return list(found[0] if len(found) == 1 else torch.cat(found, dim=2))

    def _of_classes(self, times: Tensor) -> Modulations:
        return self.model.modulate(times.expand(len(self.classes), -1), self.classes)


class StepVelocity:
    """The guided velocity of the tokens of one step; the `Predict` of a flow head.

    The first call also feeds the tokens of the step before, which the cache keeps (the release does the same).

    Args:
        model: the network.
        modulations: of the conditional rows, and after them of the unconditional ones.
        cache: all steps before the last, of both branches, or of the first alone if no later step is guided either.
        context: the tokens of the step before `[b k c]`, scaled; `None` at the first step.
        scale: of the guidance.
    """

    def __init__(
        self,
        model: XAR,
        modulations: SharedModulations,
        cache: KVCache,
        context: Tensor | None,
        scale: float,
    ) -> None:
        self.model = model
        self.modulations = modulations
        self.cache = cache
        self.context = context
        self.scale = scale

    def __call__(self, noisy: Tensor, time: float) -> Tensor:
        """`noisy [b k c]` -> `[b k c]`, float64 where it is guided."""
        latents, times, cache = noisy.float(), [time], self.cache
        if self.context is not None:  # for both branches, even if this step itself is not guided
            latents, times = torch.cat([self.context, latents], dim=1), [0.0, time]
            self.context = None
        elif self.scale == 1.0:
            cache = cache.narrow(len(noisy))
        rows = cache.batch_size
        velocity = self.model.velocity(
            latents.repeat(rows // len(noisy), 1, 1), self.modulations.at(times, rows), cache
        )  # [rows k c]
        if self.scale == 1.0:
            return velocity[: len(noisy)]
        cond, uncond = velocity.double().chunk(2)
        return apply_guidance(cond, uncond, self.scale)
