"""Rectified flow for decoders that sample: training pairs, guidance of velocities, Euler integration.

Time runs from 0 (clean) to 1 (noise) along a straight line; a model predicts the velocity `noise - clean` (Liu et al.
2022, "Flow Straight and Fast", section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

GuidanceScale = float | Callable[[float], float]  # a number, or a function of the time; 1.0 is off


def interpolate(clean: Tensor, noise: Tensor, noise_levels: Tensor) -> Tensor:
    """Points on the straight lines from `clean` to `noise` (both `[b ...]`) at `noise_levels` in [0, 1].

    There is one level per image `[b]`, or one per token `[b n]` of `clean [b n ...]`.
    """
    levels = noise_levels.reshape(*noise_levels.shape, *(1,) * (clean.ndim - noise_levels.ndim))
    return levels * noise + (1 - levels) * clean


def mode_noise_levels(uniform: Tensor, mode_scale: float = 0.25) -> Tensor:
    """Noise levels `[b]` in [0, 1], denser or sparser in the middle (Esser et al. 2024, equation 20).

    Args:
        uniform: draws in [0, 1], `[b]`.
        mode_scale: 0 keeps the levels uniform; positive values favour the middle.
    """
    return 1 - uniform - mode_scale * (torch.cos(torch.pi / 2 * uniform).square() - 1 + uniform)


def logit_normal_noise_levels(normal: Tensor) -> Tensor:
    """Noise levels `[b]` in (0, 1) of standard normal draws `[b]` (Esser et al. 2024, equation 19, mean 0, scale 1)."""
    return normal.sigmoid()


def stratified_normal(uniform: Tensor) -> Tensor:
    """Standard normal draws `[b]`, one from each of `b` equally likely intervals, of `uniform [b]` in (0, 1)."""
    num_strata = len(uniform)
    return torch.special.ndtri((torch.arange(num_strata, device=uniform.device) + uniform) / num_strata)


class FlowGuidance(Protocol):
    """Guidance of one run: may remember earlier steps, for every image by itself."""

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The guided velocity `[b c h w]` of a conditional and an unconditional one."""
        ...


class PlainGuidance:
    """Classifier-free guidance (Ho and Salimans 2022): `uncond + scale * (cond - uncond)`."""

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        return uncond.lerp(cond, scale)


class NormalizedGuidance:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), applied to velocities as FlexTok does.

    The difference of both predictions is averaged over the steps with a negative momentum, shortened to
    `norm_threshold`, and its part along the conditional prediction is weighted by `eta`.

    Args:
        momentum: weight of the earlier differences.
        eta: weight of the parallel part, which saturates colours; 1.0 keeps it.
        norm_threshold: longest Euclidean norm of a difference over a whole image.
    """

    def __init__(self, momentum: float = -0.5, eta: float = 0.0, norm_threshold: float = 2.5) -> None:
        self.momentum = momentum
        self.eta = eta
        self.norm_threshold = norm_threshold
        self._average: Tensor | None = None  # [b c h w], before the shortening

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        difference = cond - uncond
        if self._average is not None:
            difference = difference + self.momentum * self._average
        self._average = difference
        norm = difference.flatten(1).norm(dim=1)[:, None, None, None]
        difference = difference * (self.norm_threshold / norm).clamp(max=1.0)
        parallel, orthogonal = _split_along(difference, cond)
        return cond + (scale - 1) * (orthogonal + self.eta * parallel)


def _split_along(vectors: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of `vectors [b c h w]` along and across `directions [b c h w]`, image by image, in float64."""
    units = F.normalize(directions.double().flatten(1), dim=1, eps=1e-12)  # [b c*h*w]
    flat = vectors.double().flatten(1)
    parallel = (flat * units).sum(dim=1, keepdim=True) * units
    orthogonal = (flat - parallel).reshape(vectors.shape).to(vectors.dtype)
    return parallel.reshape(vectors.shape).to(vectors.dtype), orthogonal


GUIDANCE_MODES: dict[str, Callable[[], FlowGuidance]] = {
    "normalized": NormalizedGuidance,
    "plain": PlainGuidance,
}


def make_flow_guidance(mode: str) -> FlowGuidance:
    """Fresh guidance for one run by its name, `"normalized"` or `"plain"`.

    Raises:
        ValueError: no such mode.
    """
    if mode not in GUIDANCE_MODES:
        raise ValueError(f"unknown guidance_mode {mode!r}; choose one of {', '.join(GUIDANCE_MODES)}")
    return GUIDANCE_MODES[mode]()


def time_schedule(num_inference_steps: int, timesteps: Sequence[float] | None = None) -> list[float]:
    """The times at which the model is evaluated, from 1 downwards; the last step ends at 0.

    Args:
        num_inference_steps: number of equal steps.
        timesteps: times of unequal steps, which take the place of the equal ones.

    Raises:
        ValueError: no step, or times that do not start at 1 and fall.
    """
    if timesteps is None:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        return [step / num_inference_steps for step in range(num_inference_steps, 0, -1)]
    times = [float(time) for time in timesteps]
    falls = all(later < earlier for earlier, later in zip(times, times[1:], strict=False))
    if not times or times[0] != 1.0 or times[-1] <= 0 or not falls:
        raise ValueError(f"timesteps must start at 1.0 and fall towards 0, which is left out; got {times}")
    return times


def euler(velocity: Callable[[Tensor, int], Tensor], noise: Tensor, times: Sequence[float]) -> Tensor:
    """Follow `velocity` from `noise [b c h w]` at the first of `times` down to time 0 with Euler steps.

    Args:
        velocity: `(latents [b c h w] float32, step) -> [b c h w] float32` at `times[step]`.
        noise: where to start.
        times: falling; see `time_schedule`.
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=list(times))
    scheduler.set_begin_index(0)
    latents = noise
    for step, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(velocity(latents, step), timestep, latents, return_dict=False)[0]
    return latents
