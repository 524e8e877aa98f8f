"""Exponential moving average of a model's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copies of the parameters; the decay warms up as `min(decay, (1 + n) / (10 + n))` over n updates."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        names = list(self.average)
        torch._foreach_lerp_([self.average[n] for n in names], [parameters[n] for n in names], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the averages."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint."""
        return {"num_updates": self.num_updates, **self.average}

    def load_state_dict(self, state: dict) -> None:
        """From a checkpoint."""
        self.num_updates = state["num_updates"]
        for name, value in self.average.items():
            value.copy_(state[name])
