"""Continuous speculative decoding: a small MAR drafts tokens, a large one verifies them (Wang et al. 2024,
"Continuous Speculative Decoding for Autoregressive Image Generation").

A drafted token is accepted with a probability that compares two Gaussians, the last denoising steps of the
draft's chain and of the target's (`Trajectory`), and the variances along both chains. What is rejected is
drawn anew from what the target has more of, `max(0, p - q / R)`. Both models walk their chains with the same
noise at the same position ("denoising trajectory alignment"), and the first steps, which have little context,
are the target's own ("token pre-filling").

What is promised, and what is not. For tokens that are drawn from the draft's Gaussian and decided one by one,
an inner temperature T of 1 and chains of equal variances (R = 1), this is speculative sampling: accepted and
redrawn tokens together follow the target exactly. The released procedure, which `generate_speculative`
reproduces, is another in four ways: the token is the mean of the draft's Gaussian, not a draw from it; T is
42, as if both Gaussians were 42 times as wide, so that far more is accepted; a rejection does not discard the
tokens drafted after it; and tokens that find no replacement in 100 trials become zero. How far T alone moves
the result, for tokens of one channel drawn from the draft, unit variances and R = 1, as total variation from
the target (by integration, not a measurement of images):

    distance of the means       0.25    0.5     1       2       4       10
    the draft's own tokens      0.099   0.197   0.383   0.683   0.954   1.000
    result at T = 42            0.099   0.197   0.382   0.681   0.950   0.972
    result at T = 1             0       0       0       0       0       0

So at T = 42 nothing but the draft comes out unless the means are tens of standard deviations apart. A
standard deviation is about 0.006 at the last of MAR's 100 denoising steps, where tokens are about 1 wide:
that many are a visible difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule
from vistok.decoding.mar_sampling import (
    Backbone,
    GuidedDenoiser,
    Source,
    both_branches,
    empty_canvas,
    make_plan,
    put,
)
from vistok.decoding.ordered import StepCallback
from vistok.models.generators.mar import MAR, take
from vistok.models.heads.diffusion import DiffusionHead, Trajectory
from vistok.tokens import Tokens

MAX_TRIALS = 100


@dataclass(frozen=True)
class AcceptRule:
    """When a drafted token is accepted, and what replaces a rejected one; float64, in log space.

    Args:
        inner_temperature: how much wider both Gaussians are taken to be for the acceptance, but neither for
            their normalisation nor for the replacement. 1 is speculative sampling.

    Raises:
        ValueError: it is not above 0.
    """

    inner_temperature: float = 42.0

    def __post_init__(self) -> None:
        if not 0 < self.inner_temperature < float("inf"):
            raise ValueError(f"inner_temperature must be above 0 and finite, got {self.inner_temperature}")

    def log_bound(self, draft: Trajectory, target: Trajectory) -> Tensor:
        """log R: how the variances along both chains compare; `[... c]` -> `[...]`."""
        return (target.log_std_sum.double() - draft.log_std_sum.double()).sum(dim=-1)

    def log_ratio(self, tokens: Tensor, draft: Trajectory, target: Trajectory) -> Tensor:
        """A token `[... c]` is accepted with probability `min(1, exp(log_ratio))`, `[...]`."""
        widths = (draft.std.double().log() - target.std.double().log()).sum(dim=-1)
        distances = _squared_distance(tokens, draft) - _squared_distance(tokens, target)
        return distances / (2 * self.inner_temperature**2) + self.log_bound(draft, target) + widths

    def residual_share(self, proposals: Tensor, draft: Trajectory, target: Trajectory) -> Tensor:
        """A proposal `[... c]` of the target replaces a token with probability `max(0, 1 - q / (R p))`."""
        log_draft, log_target = (_log_density(proposals, one) for one in (draft, target))
        return (1 - (log_draft - log_target - self.log_bound(draft, target)).exp()).clamp_min(0)


def _squared_distance(tokens: Tensor, gaussian: Trajectory) -> Tensor:
    """In standard deviations: `[... c]` -> `[...]`."""
    return ((tokens.double() - gaussian.mean.double()) / gaussian.std.double()).square().sum(dim=-1)


def _log_density(tokens: Tensor, gaussian: Trajectory) -> Tensor:
    """But for a constant that all have in common."""
    return -_squared_distance(tokens, gaussian) / 2 - gaussian.std.double().log().sum(dim=-1)


@dataclass(frozen=True)
class Draws:
    """The randomness of one verification.

    Args:
        uniforms: `[b k]` in [0, 1), for the acceptance.
        trial_normals: `[b t k c]`, of the proposals.
        trial_uniforms: `[b t k]` in [0, 1), for their acceptance.
    """

    uniforms: Tensor
    trial_normals: Tensor
    trial_uniforms: Tensor

    @classmethod
    def from_streams(cls, streams: Source, num_tokens: int, latent_dim: int, device: torch.device) -> Draws:
        """Always as many, whatever is accepted, so that no image depends on its neighbours."""
        return cls(
            streams.uniform(num_tokens).to(device),
            streams.normal(MAX_TRIALS, num_tokens, latent_dim).to(device),
            streams.uniform(MAX_TRIALS, num_tokens).to(device),
        )


@dataclass(frozen=True)
class Resampled:
    """Replacements for the tokens of a block, whether they are needed or not."""

    tokens: Tensor  # [b k c]; zero where no trial succeeded
    num_trials: Tensor  # [b] int64


@dataclass(frozen=True)
class Decision:
    """What became of a block of drafted tokens."""

    log_ratio: Tensor  # [b k] float64
    is_accepted: Tensor  # [b k]
    resampled: Resampled
    tokens: Tensor  # [b k c]: accepted ones, and replacements of the others


def decide(tokens: Tensor, draft: Trajectory, target: Trajectory, draws: Draws, rule: AcceptRule) -> Decision:
    """Accept or replace every token of a block, each by itself.

    Args:
        tokens: `[b k c]`, as drafted.
        draft, target: how either model would have drawn them, `[b k c]`.
        draws: fresh.
        rule: see there.
    """
    log_ratio = rule.log_ratio(tokens, draft, target)
    is_accepted = log_ratio > draws.uniforms.double().log()
    resampled = resample(draft, target, draws, rule)
    kept = torch.where(is_accepted[..., None], tokens, resampled.tokens.to(tokens.dtype))
    return Decision(log_ratio, is_accepted, resampled, kept)


def resample(draft: Trajectory, target: Trajectory, draws: Draws, rule: AcceptRule) -> Resampled:
    """Bounded acceptance-rejection from `max(0, p - q / R)`, with proposals from the target.

    As in the release, all tokens of an image take part, also those that were accepted; trials end when each
    has had a success, and the last one counts. The release ends them for all images of a batch together.
    """
    target_rows, draft_rows = _unsqueezed(target), _unsqueezed(draft)  # [b 1 k c]
    proposals = target_rows.mean + target_rows.std * draws.trial_normals  # [b t k c]
    is_success = draws.trial_uniforms < rule.residual_share(proposals, draft_rows, target_rows)  # [b t k]
    are_done = is_success.cummax(dim=1).values.all(dim=2)  # [b t]
    trials = torch.arange(1, are_done.shape[1] + 1, device=are_done.device)
    num_trials = ((~are_done).sum(dim=1) + 1).clamp_max(len(trials))  # [b]
    counts = is_success & (trials <= num_trials[:, None])[..., None]
    last = (counts * trials[:, None]).amax(dim=1)  # [b k]; 0: no success
    chosen = (last - 1).clamp_min(0)[:, None, :, None].expand(-1, 1, -1, proposals.shape[-1])
    tokens = proposals.gather(1, chosen)[:, 0].masked_fill((last == 0)[..., None], 0)
    return Resampled(tokens, num_trials)


def _unsqueezed(trajectory: Trajectory) -> Trajectory:
    """`[b k c]` -> `[b 1 k c]`."""
    return Trajectory(trajectory.mean[:, None], trajectory.std[:, None], trajectory.log_std_sum[:, None])


@dataclass(frozen=True)
class State:
    """How far a run has come; all `[b n c]`, at the positions of the images.

    Args:
        latents: tokens, scaled; those that are not decided are zero.
        drafted: how the draft's tokens were drawn; read where a token waits for its verification.
        num_verified: so many tokens of the sequence are the target's, or verified.
    """

    latents: Tensor
    drafted: Trajectory
    num_verified: int

    @classmethod
    def empty(cls, model: MAR, batch_size: int) -> State:
        """Before the first step."""
        canvas = empty_canvas(model, batch_size)
        return cls(canvas, Trajectory(canvas, canvas, canvas), 0)


def add_draft(state: State, positions: Tensor, drawn: Trajectory) -> State:
    """Tokens of the draft at `positions [b k]`, which wait for their verification."""
    old = state.drafted
    drafted = Trajectory(
        put(old.mean, positions, drawn.mean),
        put(old.std, positions, drawn.std),
        put(old.log_std_sum, positions, drawn.log_std_sum),
    )
    return replace(state, latents=put(state.latents, positions, drawn.mean), drafted=drafted)


def commit(state: State, positions: Tensor, tokens: Tensor) -> State:
    """Final tokens `[b k c]` at `positions [b k]`; all of them count as verified, replaced ones included."""
    return replace(
        state,
        latents=put(state.latents, positions, tokens),
        num_verified=state.num_verified + positions.shape[1],
    )


@dataclass(frozen=True)
class SpeculationParams:
    """How drafting and verification alternate.

    Args:
        num_draft: a block is verified at every step whose number is a multiple of it, and at the last.
        prefill: the target draws the tokens of the steps up to this share of all.
        inner_temperature: see `AcceptRule`.

    Raises:
        ValueError: a value outside its range.
    """

    num_draft: int = 8
    prefill: float = 0.15
    inner_temperature: float = 42.0

    def __post_init__(self) -> None:
        if self.num_draft < 1:
            raise ValueError(f"num_draft counts steps and must be at least 1, got {self.num_draft}")
        if not 0 <= self.prefill <= 1:
            raise ValueError(f"prefill is a share of the steps and must be in 0..1, got {self.prefill}")
        AcceptRule(self.inner_temperature)

    def is_prefill(self, step: int, num_steps: int) -> bool:
        """Whether the target draws the tokens of `step` itself; it always does so at the first."""
        return step <= num_steps * self.prefill

    def is_verified(self, step: int, num_steps: int) -> bool:
        """Whether the draft's tokens are verified after `step`."""
        return step % self.num_draft == 0 or step == num_steps - 1


@dataclass(frozen=True)
class Verification:
    """One verification, for those who watch."""

    step: int
    positions: Tensor  # [b k]
    draft: Trajectory
    target: Trajectory
    decision: Decision


@torch.no_grad()
def generate_speculative(
    draft: MAR,
    target: MAR,
    class_labels: Tensor,
    *,
    streams: Source,
    num_steps: int = 256,
    num_inference_steps: int = 100,
    head: DiffusionHead | None = None,
    guidance: GuidanceSchedule | None = None,
    null_labels: Tensor | None = None,
    orders: Tensor | None = None,
    speculation: SpeculationParams | None = None,
    on_step: StepCallback | None = None,
    on_verify: Callable[[Verification], None] | None = None,
) -> Tokens:
    """Sample as `generate_mar` does from `target`, with most steps left to `draft` (section 4, as released).

    The target sees verified tokens only, at the guidance scale of the step at which it verifies, where the
    draft's tokens were drawn at the scales of their own steps. See the module for what is promised of the
    result.

    Args:
        draft: a small model of the same tokens.
        target: the model to speed up.
        class_labels: `[b]` int64 in `[0, num_classes)`.
        streams: orders, then the noise of all positions (start, steps), then at each verification the draws
            of `Draws`.
        num_steps, num_inference_steps, head, guidance, null_labels, orders: as in `generate_mar`, of both
            models; the head is the target's by default.
        speculation: how both alternate.
        on_step: called after every step with the latents `[b n c]`; later verifications may replace some.
        on_verify: called after every verification; `decision.is_accepted` gives the acceptance rate.

    Returns:
        Latents `[b n c]` float32 in storage order, not scaled.

    Raises:
        ValueError: models of different tokens, or what `generate_mar` raises.
    """
    _check_pair(draft, target)
    head, guidance = head or target.head, guidance or ConstantGuidance()
    speculation = speculation or SpeculationParams()
    plan = make_plan(target, len(class_labels), num_steps, orders, streams)
    scales = plan.scales(guidance)
    labels = both_branches(target, class_labels, null_labels, scales)
    noise = AlignedNoise(streams, target, len(head.chain(num_inference_steps)))
    walk = _Walk(head, num_inference_steps, noise, labels, plan.sequence)
    state, rule = State.empty(target, len(class_labels)), AcceptRule(speculation.inner_temperature)
    for step, (start, end) in enumerate(plan.spans):
        positions = plan.sequence[:, start:end]
        if speculation.is_prefill(step, num_steps):
            state = commit(state, positions, walk(target, state.latents, start, end, scales[step]).mean)
        else:
            state = add_draft(state, positions, walk(draft, state.latents, start, end, scales[step]))
        if state.num_verified < end and speculation.is_verified(step, num_steps):
            block = plan.sequence[:, state.num_verified : end]
            verifier = walk(target, state.latents, state.num_verified, end, scales[step])
            done = _verify(state, step, block, verifier, streams, rule)
            state = commit(state, block, done.decision.tokens)
            if on_verify is not None:
                on_verify(done)
        if on_step is not None:
            on_step(step, state.latents / target.latent_scale)
    return Tokens(latents=state.latents / target.latent_scale, layout=target.layout)


def _verify(
    state: State, step: int, block: Tensor, target: Trajectory, streams: Source, rule: AcceptRule
) -> Verification:
    drafted = state.drafted
    draft = Trajectory(take(drafted.mean, block), take(drafted.std, block), take(drafted.log_std_sum, block))
    draws = Draws.from_streams(streams, block.shape[1], target.mean.shape[-1], block.device)
    decision = decide(take(state.latents, block), draft, target, draws, rule)
    return Verification(step, block, draft, target, decision)


def _check_pair(draft: MAR, target: MAR) -> None:
    names = ("latent_dim", "latent_scale", "num_tokens", "num_classes", "layout", "device")
    for name in names:
        ours, theirs = getattr(draft, name), getattr(target, name)
        if ours != theirs:
            raise ValueError(f"draft and target must have the same {name}, got {ours} and {theirs}")


class AlignedNoise:
    """The noise of every position, the same for both models and both branches of guidance.

    Args:
        streams: where it is drawn, all at once.
        model: either of both.
        num_denoising: steps of a chain.
    """

    def __init__(self, streams: Source, model: MAR, num_denoising: int) -> None:
        shape = model.num_tokens, model.latent_dim
        self.start = streams.normal(*shape).to(model.device)  # [b n c]
        # Entry 0 of a chain, whose last step takes no noise, is not used; the release draws it, too.
        self.steps = streams.normal(shape[0], num_denoising, shape[1]).to(model.device)  # [b n t c]

    def at(self, positions: Tensor) -> Callable[[torch.dtype], Tensor]:
        """The `Draw` of the tokens at `positions [b k]`: the start, then the steps from the noisiest down."""
        steps = self.steps.unbind(dim=2)
        pending = iter([self.start, *reversed(steps[1:])])
        return lambda dtype: take(next(pending), positions).to(dtype)


@dataclass(frozen=True)
class _Walk:
    """Draws tokens with either model."""

    head: DiffusionHead
    num_inference_steps: int
    noise: AlignedNoise
    labels: Tensor
    sequence: Tensor

    def __call__(self, model: MAR, latents: Tensor, start: int, end: int, scale: float) -> Trajectory:
        """Tokens `start` to `end` of the sequence from the first `start`, which are in `latents [b n c]`."""
        backbone = Backbone(model, self.labels, self.sequence, ContextReuse(period=1))
        conditions = backbone.conditions(latents, start, end)
        timesteps = self.head.chain(self.num_inference_steps).timesteps.tolist()
        predict = GuidedDenoiser(model.denoiser, conditions, scale, timesteps, len(latents))
        draw = self.noise.at(self.sequence[:, start:end])
        return self.head.trajectory(predict, draw, num_inference_steps=self.num_inference_steps)
