"""The flow head: a token is drawn by following a velocity from noise (time 1) to data (time 0), as in xAR.

Noised tokens lie on straight lines, `(1 - t) clean + t noise`, and the network predicts `noise - clean` (Liu et al. 2022,
section 2). From the velocity v at x follows the score `-((1 - t) v + x) / t`, so that the same network serves a stochastic
equation with the same marginals (Ma et al. 2024, SiT, section 2).

The state of an integration is float64, whatever the network computes in: a step of bfloat16 is coarser than the steps
themselves. diffusers' flow-matching schedulers keep it in float32 and have no stochastic one of this kind.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from vistok.models.heads.base import Draw, Predict
from vistok.models.tokenizers.flow import interpolate, logit_normal_noise_levels


class Integrator(Protocol):
    """One way to follow a velocity from time 1 to time 0."""

    def times(self, num_inference_steps: int) -> list[float]:
        """The times at which the network is evaluated, falling from 1, and then 0; raises ValueError for too few."""
        ...

    def step(self, state: Tensor, velocity: Tensor, time: float, after: float, draw: Draw) -> Tensor:
        """From `state [b k c]` at `time` to the one at time `after`, both float64."""
        ...


@dataclass(frozen=True)
class Euler:
    """Equal steps along the velocity, without noise."""

    def times(self, num_inference_steps: int) -> list[float]:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        return list(_falling(0.0, num_inference_steps + 1))

    def step(self, state: Tensor, velocity: Tensor, time: float, after: float, draw: Draw) -> Tensor:
        return state + (after - time) * velocity


@dataclass(frozen=True)
class EulerMaruyama:
    """Steps along the drift `v - t score` with noise of variance `2 t` per unit of time (SiT, section 2).

    The last step, from `last_time` to 0, takes no noise: there the score cannot be told from the velocity any more.
    """

    last_time: float = 0.04

    def times(self, num_inference_steps: int) -> list[float]:
        if num_inference_steps < 3:
            raise ValueError(
                "Euler-Maruyama needs at least 3 steps, one with noise between the first, from pure noise, and the "
                f"last, without; got {num_inference_steps}; Euler takes fewer"
            )
        return [*_falling(self.last_time, num_inference_steps), 0.0]

    def step(self, state: Tensor, velocity: Tensor, time: float, after: float, draw: Draw) -> Tensor:
        drift = (2 - time) * velocity + state
        state = state + (after - time) * drift
        if after == 0:
            return state
        return state + (2 * time * (time - after)) ** 0.5 * draw(state.dtype)


@dataclass(frozen=True)
class FlowHead:
    """A `ContinuousHead` over velocities; it has no weights. Times run from 0 (data) to 1 (noise).

    Args:
        integrator: how tokens are drawn.
    """

    integrator: Integrator = EulerMaruyama()

    @property
    def guidance_space(self) -> str:
        return "velocity"

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return interpolate(clean, noise, times)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error over the channels, the same weight at every time."""
        return (prediction.float() - (noise - clean).float()).square().mean(dim=-1)

    def sample(self, predict: Predict, draw: Draw, *, num_inference_steps: int) -> Tensor:
        """See `ContinuousHead.sample`; the starting noise is drawn in float32, all else is float64."""
        times = self.integrator.times(num_inference_steps)
        state = draw(torch.float32).double()
        for time, after in pairwise(times):
            velocity = predict(state, time).double()
            state = self.integrator.step(state, velocity, time, after, draw)
        return state


@functools.lru_cache(maxsize=256)
def _falling(end: float, count: int) -> tuple[float, ...]:
    """Evenly spaced times from 1 to `end`; made once, as every step of an order asks for them."""
    return tuple(torch.linspace(1, end, count, dtype=torch.float64).tolist())


def logit_normal_times(normals: Tensor) -> Tensor:
    """Times for training, float32 in (0, 1), of standard normal draws of any shape; computed in float64 as in xAR."""
    return logit_normal_noise_levels(normals.double()).float()
