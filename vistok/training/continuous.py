"""Training of continuous generators: what a batch draws besides its tokens, the loss, the measure.

A token comes as the posterior of a continuous tokenizer, `[b n 2c]`: means, then standard deviations. Every time it is
used it is drawn anew, as in MAR (Li et al. 2024) and xAR (Ren et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.models.generators.mar import MAR, hide_tokens, mask_ratio, masked_diffusion_loss
from vistok.models.generators.xar import XAR, noisy_context_loss
from vistok.models.heads.diffusion import NUM_TIMESTEPS
from vistok.models.heads.flow import logit_normal_times

HEAD_REPEATS = 4  # of MAR's head per evaluation of its backbone (Li et al. 2024, section 4.2)


class ContinuousObjective:
    """A regression on noised tokens. A value measured for a batch is its mean; it is no likelihood.

    Args:
        name: of the measure.
        draw_more: tokens `[b n c]` -> what the loss needs besides tokens and labels, rows first.
        loss_of: the loss of a model, tokens `[b n c]`, labels `[b]` and what was drawn.
    """

    def __init__(
        self,
        name: str,
        draw_more: Callable[[Tensor, torch.Generator], tuple[Tensor, ...]],
        loss_of: Callable[..., Tensor],
    ) -> None:
        self.name = name
        self.draw_more = draw_more
        self.loss_of = loss_of

    def draw(self, posterior: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Tokens `[b n c]` of a `posterior [b n 2c]`, and what the loss needs besides."""
        mean, std = posterior.float().chunk(2, dim=-1)
        tokens = mean + std * torch.randn(mean.shape, generator=generator)
        return tokens, *self.draw_more(tokens, generator)

    def loss(
        self, model: Any, labels: Tensor, posterior: Tensor, *drawn: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of the family; nothing is logged beside it."""
        tokens, *more = drawn
        return self.loss_of(model, tokens, labels, *more), {}

    def measure(self, model: Any, labels: Tensor, posterior: Tensor, *drawn: Tensor) -> dict[str, Tensor]:
        """The loss of the family, once per image `[b]`."""
        tokens, *more = drawn
        return {self.name: self.loss_of(model, tokens, labels, *more).expand(len(labels))}


def flow_objective(model: XAR) -> ContinuousObjective:
    """Velocities, every step of the order at a time of its own."""

    def draw(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        normals = torch.randn(len(tokens), model.order.num_steps, generator=generator)
        return logit_normal_times(normals), torch.randn(tokens.shape, generator=generator)

    return ContinuousObjective("heldout_flow_loss", draw, noisy_context_loss)


def masked_diffusion_objective(model: MAR) -> ContinuousObjective:
    """Noise of hidden tokens; as many are hidden in every image of a batch."""

    def draw(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        ratio = mask_ratio(torch.rand((), generator=generator).item())
        orders = torch.rand(tokens.shape[:2], generator=generator).argsort(dim=1)
        shape = (len(tokens), HEAD_REPEATS, *tokens.shape[1:])
        timesteps = torch.randint(NUM_TIMESTEPS, shape[:3], generator=generator)
        return hide_tokens(orders, ratio), timesteps, torch.randn(shape, generator=generator)

    def loss_of(
        model: MAR, tokens: Tensor, labels: Tensor, is_hidden: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        return masked_diffusion_loss(
            model, tokens, labels, is_hidden, timesteps.transpose(0, 1), noise.transpose(0, 1)
        )

    return ContinuousObjective("heldout_diffusion_loss", draw, loss_of)
