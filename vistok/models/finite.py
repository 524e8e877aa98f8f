"""NaN and infinity in a loop that the host must not slow down: noted on the device, asked for once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


class FirstBadStep:
    """At which step the values of each image were first not finite.

    Args:
        batch_size: images.
        num_steps: of the loop.
        device: of the values.
    """

    def __init__(self, batch_size: int, num_steps: int, device: torch.device) -> None:
        self.num_steps = num_steps
        self._first = torch.full((batch_size,), num_steps, device=device)

    def note(self, step: int, values: Tensor) -> None:
        """Look at `values [b ...]` of a step, counted from 0."""
        is_finite = values.isfinite().flatten(1).all(dim=1)
        self._first = torch.where(is_finite, self._first, self._first.clamp_max(step))

    def check(self, model: str) -> None:
        """Raises ValueError, naming the step, the images and the `model`, if anything was not finite."""
        first = self._first.tolist()
        if not first or min(first) == self.num_steps:
            return
        images = [str(image) for image, step in enumerate(first) if step < self.num_steps]
        raise ValueError(
            f"{model} gave NaN or infinity at step {min(first)} of {self.num_steps}, counted from 0, for image "
            f"{', '.join(images)}: are these the weights of this model, and does it run in float32?"
        )
