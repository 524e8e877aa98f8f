"""Classifier-free guidance (Ho and Salimans 2022): one formula, and schedules over the steps. 1.0 is off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vistok.kernels.sampling import apply_guidance as apply_guidance  # belongs to this module's names


def check_guidance_scale(scale: float) -> None:
    """Raises ValueError unless `scale` is finite and at least 1."""
    if not 1 <= scale < float("inf"):
        raise ValueError(f"guidance_scale must be at least 1, which is off, and finite; got {scale}")


class GuidanceSchedule(Protocol):
    """A guidance scale per step."""

    @property
    def scale(self) -> float:
        """What the schedule was made for; 1.0 is off."""
        ...

    def at(self, step: int, num_steps: int) -> float:
        """The scale at `step` of `num_steps`, counted from 0."""
        ...


@dataclass(frozen=True)
class ConstantGuidance:
    """The same scale at every step."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_guidance_scale(self.scale)

    def at(self, step: int, num_steps: int) -> float:
        return self.scale


@dataclass(frozen=True)
class StepsGuidance:
    """`scale` for the first `num_guided` steps, then off (the "cfg interval" of LlamaGen and NAR)."""

    scale: float
    num_guided: int

    def __post_init__(self) -> None:
        check_guidance_scale(self.scale)
        if self.num_guided < 0:
            raise ValueError(f"num_guided counts steps and must be at least 0, got {self.num_guided}")

    def at(self, step: int, num_steps: int) -> float:
        return self.scale if step < self.num_guided else 1.0


@dataclass(frozen=True)
class LinearGuidance:
    """From 1.0 at step 0 towards `scale`, which would be reached after the last step (as in TiTok's generators)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_guidance_scale(self.scale)

    def at(self, step: int, num_steps: int) -> float:
        return 1 + (self.scale - 1) * step / num_steps


@dataclass(frozen=True)
class RampGuidance:
    """From 1.0 at step 0 to `scale` at the last step (as in xAR, whose steps are cells); `scale` if there is but one."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_guidance_scale(self.scale)

    def at(self, step: int, num_steps: int) -> float:
        return self.scale if num_steps == 1 else 1 + (self.scale - 1) * step / (num_steps - 1)


@dataclass(frozen=True)
class PowerCosineGuidance:
    """From 1.0 at step 0 towards `scale` along `(1 - cos(pi t^power)) / 2` (Gao et al. 2023, MDT, section 3.4)."""

    scale: float = 1.0
    power: float = 3.0

    def __post_init__(self) -> None:
        check_guidance_scale(self.scale)
        if not 0 < self.power < float("inf"):
            raise ValueError(f"guidance_power must be above 0 and finite, got {self.power}")

    def at(self, step: int, num_steps: int) -> float:
        progress = (1 - math.cos(math.pi * (step / num_steps) ** self.power)) / 2
        return 1 + (self.scale - 1) * progress


def make_guidance(schedule: str, scale: float, power: float = 3.0) -> GuidanceSchedule:
    """A schedule by its name: `"constant"`, `"linear"`, `"ramp"` or `"power-cosine"`, to which alone `power` applies.

    Raises:
        ValueError: no such schedule.
    """
    if schedule == "power-cosine":
        return PowerCosineGuidance(scale, power)
    plain: dict[str, Callable[[float], GuidanceSchedule]] = {
        "constant": ConstantGuidance,
        "linear": LinearGuidance,
        "ramp": RampGuidance,
    }
    if schedule not in plain:
        known = ", ".join([*plain, "power-cosine"])
        raise ValueError(f"unknown guidance schedule {schedule!r}; choose one of {known}")
    return plain[schedule](scale)
