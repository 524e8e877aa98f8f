"""How many denoising steps each step of an order gets: DiSA (Zhao et al. 2025, "DiSA: Diffusion Step
Annealing in Autoregressive Image Generation"). The later a token is decided the more it follows from the
others, and fewer do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SCHEDULES = ("linear", "cosine", "two-stage", "constant")


def annealed_steps(num_steps: int, most: int, least: int, schedule: str = "linear") -> tuple[int, ...]:
    """Denoising steps per step of an order, from `most` at the first to `least` at the last.

    Published are 50 and 15 for xAR's four cells, (50, 38, 26, 15), and 50 and 5 for MAR's 64 steps, together
    with chains that begin at timestep 950 (`DiffusionHead(last_timestep=950)`); both linear.

    Args:
        num_steps: of the order.
        most, least: denoising steps.
        schedule: `"linear"`; `"cosine"`, half a period; `"two-stage"`, `most` in the first half and `least`
            in the second; `"constant"`, `least` everywhere.

    Raises:
        ValueError: no steps, not `1 <= least <= most`, or an unknown schedule.
    """
    if num_steps < 1:
        raise ValueError(f"an order has at least one step, got {num_steps}")
    if not 1 <= least <= most:
        raise ValueError(
            f"annealing leads from most down to least, at least 1; got most {most}, least {least}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if num_steps == 1:
        return (least if schedule == "constant" else most,)
    shares = (_share(step, num_steps - 1, schedule) for step in range(num_steps))
    return tuple(least + math.floor(share * (most - least)) for share in shares)


def _share(step: int, last: int, schedule: str) -> float:
    """How much of what goes beyond `least` is left at `step`, from 1 to 0."""
    match schedule:
        case "linear":
            return (last - step) / last
        case "cosine":
            return (math.cos(math.pi * step / last) + 1) / 2
        case "two-stage":
            return 1.0 if step < last / 2 else 0.0
    return 0.0


def steps_of_each(counts: int | Sequence[int], num_steps: int) -> list[int]:
    """One number of denoising steps for every step of an order, of one for all or one for each.

    Raises:
        ValueError: not one per step.
    """
    counts = [counts] * num_steps if isinstance(counts, int) else list(counts)
    if len(counts) != num_steps:
        raise ValueError(
            f"num_inference_steps must be one integer or {num_steps} of them, one per step; got {counts}"
        )
    return counts
