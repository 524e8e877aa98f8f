"""Training of masked generators: which tokens are hidden, which labels are dropped, and the loss (TiTok's release)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_tokens(
    indices: Tensor, timesteps: Tensor, rand: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Hide a random share of the tokens of each image: `arccos(timestep) / (pi / 2)` of them, at least one.

    Args:
        indices: `[b n]` int64.
        timesteps: `[b]` uniform draws in [0, 1).
        rand: `[b n]` uniform draws in [0, 1); they choose the positions.
        mask_token_id: what replaces a hidden token.

    Returns:
        The masked indices `[b n]` int64, and `[b n]` boolean, True where a token was hidden.
    """
    num_tokens = indices.shape[1]
    ratio = (timesteps.acos() / (math.pi / 2)).clamp(1e-6, 1)
    count = (num_tokens * ratio).round().clamp_min(1)  # [b]
    is_masked = rand.argsort(dim=-1) < count[:, None]  # [b n]
    return indices.masked_fill(is_masked, mask_token_id), is_masked


def drop_labels(class_labels: Tensor, rand: Tensor, null_label: int, rate: float = 0.1) -> Tensor:
    """Replace labels by `null_label` where `rand` is below `rate`, for classifier-free guidance; all are `[b]`."""
    return class_labels.masked_fill(rand < rate, null_label)


@dataclass(frozen=True)
class MaskedLoss:
    """What one training batch gave."""

    loss: Tensor  # scalar
    accuracy: Tensor  # scalar: share of hidden tokens predicted right, per image, then averaged


def masked_loss(
    logits: Tensor,
    indices: Tensor,
    is_masked: Tensor,
    *,
    label_smoothing: float = 0.1,
    unmasked_weight: float = 0.1,
) -> MaskedLoss:
    """Cross-entropy on all positions, those that were visible with a small weight.

    Args:
        logits: `[b n v]`.
        indices: `[b n]` int64, the true tokens.
        is_masked: `[b n]` boolean from `mask_tokens`.
        label_smoothing: share of the target spread evenly over all codes.
        unmasked_weight: weight of a visible position; a hidden one has 1.
    """
    logits = logits.float()
    loss = F.cross_entropy(
        logits.transpose(1, 2), indices, label_smoothing=label_smoothing, reduction="none"
    )  # [b n]
    weight = torch.where(is_masked, 1.0, unmasked_weight)
    correct = (logits.argmax(dim=-1) == indices) & is_masked
    accuracy = correct.sum(dim=-1) / is_masked.sum(dim=-1).clamp_min(1)  # [b]
    return MaskedLoss((loss * weight).sum() / (weight.sum() + 1e-8), accuracy.mean())


class MaskedObjective:
    """Prediction of hidden tokens. `heldout_masked_loss`, over fixed masks, is not a likelihood of the image.

    Without label smoothing, so that sampled tokens come from the model's own distribution.

    Args:
        mask_token_id: of the model.
    """

    def __init__(self, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id

    def draw(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The masked indices and which were hidden, see `mask_tokens`."""
        timesteps = torch.rand(len(indices), generator=generator)
        rand = torch.rand(indices.shape, generator=generator)
        return mask_tokens(indices, timesteps, rand, self.mask_token_id)

    def loss(
        self, model: Any, labels: Tensor, indices: Tensor, *drawn: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`masked_loss` of what `draw` hid; logs the accuracy."""
        seen, is_masked = drawn
        result = masked_loss(model(seen, labels), indices, is_masked, label_smoothing=0.0)
        return result.loss, {"accuracy": result.accuracy.detach()}

    def measure(self, model: Any, labels: Tensor, indices: Tensor, *drawn: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy of the hidden tokens of each image `[b]`, in nats."""
        seen, is_masked = drawn
        loss = F.cross_entropy(model(seen, labels).float().mT, indices, reduction="none")  # [b n]
        return {"heldout_masked_loss": (loss * is_masked).sum(dim=1) / is_masked.sum(dim=1)}
