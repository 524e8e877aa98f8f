"""The loop of MAR: a few positions of a random order after the other, a chain of denoising steps for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.ordered import StepCallback
from vistok.decoding.step_schedules import steps_of_each
from vistok.decoding.streams import NormalSource, StepNoise, UniformSource, to_device
from vistok.models.finite import FirstBadStep
from vistok.models.generators.mar import MAR, Cache, take
from vistok.models.heads.diffusion import Denoiser, DiffusionHead, Modulation
from vistok.tokens import Tokens

ROWS_AT_ONCE = 1024  # modulations of tokens times denoising steps that are kept at a time


class Source(UniformSource, NormalSource, Protocol):
    """Uniform and normal draws."""


@torch.no_grad()
def generate_mar(
    model: MAR,
    class_labels: Tensor,
    *,
    streams: Source,
    num_steps: int = 64,
    num_inference_steps: int | Sequence[int] = 100,
    head: DiffusionHead | None = None,
    guidance: GuidanceSchedule | None = None,
    null_labels: Tensor | None = None,
    orders: Tensor | None = None,
    reuse: ContextReuse | None = None,
    on_step: StepCallback | None = None,
) -> Tokens:
    """Sample the tokens of a batch of images (Li et al. 2024, section 4.3).

    Every step evaluates encoder and decoder on what is decided, and draws the tokens of the positions whose
    turn it is.

    Context reuse (ReCAP) changes the result. After a full evaluation the keys and values of everything that
    it evaluated are kept in every layer: of the buffer and the decided tokens in the encoder, of these and of
    the undecided positions in the decoder. A cheap evaluation computes anew only the tokens decided since
    then and the positions that are to be decided now; they see each other and, of all the rest, what was
    kept. `vistok.eval.continuous_accelerations` measures how far it is off.

    Args:
        model: a masked generator of continuous tokens.
        class_labels: `[b]` int64 in `[0, num_classes)`.
        streams: the orders are taken from it (one uniform draw per position), then for every step the
            starting noise and that of the denoising steps.
        num_steps: evaluations of encoder and decoder; at most one per token.
        num_inference_steps: denoising steps at every step, or at each of them, as `step_schedules` gives
            them.
        head: temperature, and where chains begin; the model's own by default.
        guidance: scale by the number of tokens that are decided when a step ends, of all tokens:
            `LinearGuidance` and `ConstantGuidance` are the published ones.
        null_labels: `[b]` classes that guidance leads away from; "no class" by default.
        orders: `[b n]` int64, a permutation of the positions per image, whose end is decided first; random by
            default.
        reuse: which evaluations reuse features of the context; none by default.
        on_step: called after every step with the latents `[b n c]`; undecided ones are zero.

    Returns:
        Latents `[b n c]` float32 in storage order, not scaled: what the tokenizer decodes.

    Raises:
        ValueError: a label out of range, more steps than tokens, orders that are none, not one number of
            denoising steps per step, or too few of them; tokens that are not finite.
    """
    head, guidance, reuse = (
        head or model.head,
        guidance or ConstantGuidance(),
        reuse or ContextReuse(period=1),
    )
    plan = make_plan(model, len(class_labels), num_steps, orders, streams)
    counts = steps_of_each(num_inference_steps, num_steps)
    chains = [head.chain(count).timesteps.tolist() for count in counts]  # raises where there are too few
    scales = plan.scales(guidance)
    labels = both_branches(model, class_labels, null_labels, scales)
    backbone = Backbone(model, labels, plan.sequence, reuse)
    latents = empty_canvas(model, len(class_labels))
    first_bad = FirstBadStep(len(class_labels), num_steps, model.device)
    for step, (start, end) in enumerate(plan.spans):
        if all(scale == 1.0 for scale in scales[step:]):
            backbone.drop_unconditional()
        conditions = backbone.conditions(latents, start, end, is_full=reuse.is_full(step))
        predict = GuidedDenoiser(model.denoiser, conditions, scales[step], chains[step], len(class_labels))
        noise = StepNoise(streams, (end - start, model.latent_dim), model.device)
        drawn = head.sample(predict, noise, num_inference_steps=counts[step])  # [b k c]
        first_bad.note(step, drawn)
        latents = put(latents, plan.sequence[:, start:end], drawn)
        if on_step is not None:
            on_step(step, latents / model.latent_scale)
    first_bad.check(type(model).__name__)
    return Tokens(latents=latents / model.latent_scale, layout=model.layout)


def hidden_counts(num_tokens: int, num_steps: int) -> list[int]:
    """How many tokens are hidden after each step, at least 1: a cosine (Chang et al. 2022, section 3.3).

    The last step decides all tokens that are left, although it counts one as hidden.

    Raises:
        ValueError: fewer steps than one, or more than tokens.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(
            f"every step decides at least one token: num_steps must be in 1..{num_tokens}, got {num_steps}"
        )
    counts = [num_tokens]
    for step in range(num_steps):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / num_steps))
        counts.append(max(1, min(counts[-1] - 1, cosine)))
    return counts[1:]


@dataclass(frozen=True)
class Plan:
    """Which positions are decided at which step.

    Args:
        sequence: `[b n]` int64, the positions of each image as they are decided, ascending within a step.
        hidden: how many are hidden after each step, from `hidden_counts`.
    """

    sequence: Tensor
    hidden: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where in `sequence` each step begins and ends."""
        num_tokens = self.sequence.shape[1]
        return list(pairwise([0, *(num_tokens - count for count in self.hidden[:-1]), num_tokens]))

    def scales(self, guidance: GuidanceSchedule) -> list[float]:
        """The guidance scale of each step, by the tokens that are not hidden after it."""
        num_tokens = self.sequence.shape[1]
        return [guidance.at(num_tokens - count, num_tokens) for count in self.hidden]


def make_plan(
    model: MAR, batch_size: int, num_steps: int, orders: Tensor | None, streams: UniformSource
) -> Plan:
    """The plan of given orders, or of random ones; raises as `generate_mar` does."""
    hidden = hidden_counts(model.num_tokens, num_steps)
    if orders is None:
        orders = streams.uniform(model.num_tokens).argsort(dim=1)
    expected = torch.arange(model.num_tokens, device=orders.device).expand(batch_size, -1)
    if orders.shape != expected.shape or not torch.equal(orders.sort(dim=1).values, expected):
        raise ValueError(
            f"orders must be {list(expected.shape)}, a permutation of 0..{model.num_tokens - 1} per image; "
            f"got {orders.dtype} {list(orders.shape)}"
        )
    plan = Plan(orders.flip(1), tuple(hidden))
    ascending = [plan.sequence[:, start:end].sort(dim=1).values for start, end in plan.spans]
    return Plan(torch.cat(ascending, dim=1).to(model.device), tuple(hidden))


def both_branches(
    model: MAR, class_labels: Tensor, null_labels: Tensor | None, scales: Sequence[float]
) -> Tensor:
    """Labels of both branches, `[2b]`, or of the conditional one alone, `[b]`, if no step is guided."""
    labels = model.both_branches(class_labels, null_labels)
    return labels if any(scale != 1.0 for scale in scales) else labels[: len(class_labels)]


def empty_canvas(model: MAR, batch_size: int) -> Tensor:
    """Latents of which none is decided, `[b n c]` float32."""
    return torch.zeros(batch_size, model.num_tokens, model.latent_dim, device=model.device)


def put(canvas: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """`canvas [b n c]` with `values [b k c]` at `positions [b k]`."""
    return canvas.scatter(1, positions[..., None].expand_as(values), values)


class Backbone:
    """Encoder and decoder over one plan.

    Args:
        model: the network.
        labels: `[r]`, of all branches; `r` is once or twice the number of images.
        sequence: `[b n]`, of the plan.
        reuse: whether caches are needed.
    """

    def __init__(self, model: MAR, labels: Tensor, sequence: Tensor, reuse: ContextReuse) -> None:
        self.model = model
        self.labels = labels
        self.sequence = sequence
        self.caches: tuple[Cache, Cache] = (None, None)
        if reuse.period > 1:
            self.caches = model.new_caches(len(labels))
        self.num_kept = 0  # tokens that were decided at the last full evaluation

    def drop_unconditional(self) -> None:
        """From now on, evaluate the conditional branch alone."""
        batch_size = len(self.sequence)
        if len(self.labels) > batch_size:
            self.labels = self.labels[:batch_size]
            encoder, decoder = (None if cache is None else cache.narrow(batch_size) for cache in self.caches)
            self.caches = encoder, decoder

    def conditions(self, latents: Tensor, start: int, end: int, *, is_full: bool = True) -> Tensor:
        """What the tokens `start` to `end` of the sequence are conditioned on, `[r k d]`.

        Args:
            latents: `[b n c]`, scaled; the first `start` tokens of the sequence are decided.
            start, end: the tokens that are asked for.
            is_full: evaluate everything; if not, only what `generate_mar` says.
        """
        model, (encoder, decoder) = self.model, self.caches
        begin = 0 if is_full else self.num_kept
        last = self.sequence.shape[1] if is_full else end
        buffer = 0 if is_full else model.num_buffer_tokens
        if encoder is not None and decoder is not None:
            encoder.rollback(buffer + begin)
            decoder.rollback(0 if is_full else buffer + begin + self.sequence.shape[1] - end)
        decided = self._of_all_branches(self.sequence[:, begin:start])
        # Positions that are decided later come first, so that the cache can be rolled back to them.
        hidden = self._of_all_branches(self.sequence[:, start:last].flip(1))
        given = take(self._of_all_branches(latents), decided)
        features = model.encode(given, decided, self.labels if is_full else None, encoder)
        features = model.decode(features, decided, hidden, decoder, num_last=end - start).flip(1)
        if is_full:
            self.num_kept = start
        return model.add_condition_positions(features, self._of_all_branches(self.sequence[:, start:end]))

    def _of_all_branches(self, rows: Tensor) -> Tensor:
        """`[b ...]` -> `[r ...]`."""
        return rows.repeat(len(self.labels) // len(rows), *[1] * (rows.ndim - 1)) if len(rows) else rows


class GuidedDenoiser:
    """The guided network of the head over one chain; the `Predict` of a diffusion head.

    All that depends on condition and timestep alone, and not on the noised token, is computed for many
    denoising steps at once. Guidance moves the predicted noise only; the variance is that of the conditional
    branch.

    Args:
        denoiser: the network.
        conditions: `[r k d]`, of the conditional and, after it, of the unconditional branch.
        scale: of the guidance.
        timesteps: of the chain, ascending.
        batch_size: images.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditions: Tensor,
        scale: float,
        timesteps: Sequence[int],
        batch_size: int,
    ) -> None:
        self.denoiser = denoiser
        self.embedded = denoiser.embed_conditions(conditions[:batch_size] if scale == 1.0 else conditions)
        self.scale = scale
        self.timesteps = timesteps
        self.ready: dict[int, Modulation] = {}

    def __call__(self, noisy: Tensor, time: float) -> Tensor:
        """`noisy [b k c]` at one of the timesteps -> guided noise and variance values `[b k 2c]`."""
        branches = noisy if self.scale == 1.0 else noisy.repeat(2, 1, 1)
        prediction = self.denoiser.denoise(branches, self._modulation(int(time)))
        if self.scale == 1.0:
            return prediction
        (cond, uncond), channels = prediction.chunk(2), noisy.shape[-1]
        noise = apply_guidance(cond[..., :channels], uncond[..., :channels], self.scale)
        return torch.cat([noise, cond[..., channels:]], dim=-1)

    def _modulation(self, timestep: int) -> Modulation:
        """That of a timestep; if it is not ready, those of the next ones down the chain are made with it."""
        if timestep not in self.ready:
            last = self.timesteps.index(timestep) + 1
            at_once = max(1, ROWS_AT_ONCE // max(1, self.embedded.shape[0] * self.embedded.shape[1]))
            chosen = self.timesteps[max(0, last - at_once) : last]
            times = to_device(torch.tensor(chosen), self.embedded.device)[:, None, None]
            of_blocks, of_output = self.denoiser.modulate(self.embedded, times)  # [t r k ...]
            self.ready = {
                each: ([block[i] for block in of_blocks], of_output[i]) for i, each in enumerate(chosen)
            }
        return self.ready[timestep]
