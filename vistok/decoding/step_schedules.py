"""How many denoising steps each step of an order gets: DiSA (Zhao et al. 2025, "DiSA: Diffusion Step Annealing in
Autoregressive Image Generation"). The later a token is decided the more it follows from the others, and fewer do.
"""

from __future__ import annotations

import math


def annealed_steps(num_steps: int, most: int, least: int) -> tuple[int, ...]:
    """Denoising steps per step of an order, falling linearly from `most` at the first to `least` at the last.

    For xAR's four cells 50 and 15 are published, (50, 38, 26, 15).

    Raises:
        ValueError: no steps, or not `1 <= least <= most`.
    """
    if num_steps < 1:
        raise ValueError(f"an order has at least one step, got {num_steps}")
    if not 1 <= least <= most:
        raise ValueError(f"annealing leads from most down to least, at least 1; got most {most}, least {least}")
    if num_steps == 1:
        return (most,)
    last = num_steps - 1
    return tuple(least + math.floor((last - step) / last * (most - least)) for step in range(num_steps))
