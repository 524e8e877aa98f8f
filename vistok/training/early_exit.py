"""Training the adapter of an early exit for a trained generator, on images that the generator itself makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.sampling import token_probabilities
from vistok.models.drafters.early_exit import EarlyExitAdapter, with_early_exit
from vistok.models.generators.base import join_conditions
from vistok.training.augment import Augmentation
from vistok.training.drafter_loss import law_loss
from vistok.training.target_data import TargetImages
from vistok.training.target_task import TargetOptions, TargetTask


class EarlyExitTask(TargetTask):
    """Cross-entropy of the early exit, guided as the target is, with the laws that the target drew its tokens from.

    Args:
        model: fresh.
        options: data.
        augmentation: none.
        device: where adapter and target are.
        folder: of the run.
        seed: of prompts.

    Raises:
        ValueError: the adapter does not fit the target, or an augmentation.
    """

    def __init__(
        self,
        model: EarlyExitAdapter,
        options: TargetOptions,
        augmentation: Augmentation,
        device: torch.device,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__(options, augmentation, device)
        self.model: Any = model
        model.check_target(self.target)
        self.make_images(folder, seed, prefix_length=0)

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, TargetImages]:
        """Images at random, and what they were drawn from."""
        return self._images(self.draw_rows(batch_size, generator))

    def _images(self, rows: Tensor) -> tuple[Tensor, TargetImages]:
        return self.conditions[rows].to(self.device), self.images_at(rows)

    def loss(self, batch: tuple[Tensor, TargetImages]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Mean cross-entropy per token in nats."""
        logits = self._guided(self.model, *batch) / self.settings.temperature
        return law_loss(logits, batch[1].law_tokens, batch[1].law_probs).mean(), {}

    def _guided(self, adapter: EarlyExitAdapter, condition: Tensor, images: TargetImages) -> Tensor:
        """Logits of the early exit at all tokens, `[b n v]` float32."""
        model = with_early_exit(self.target, adapter)
        rows: Any = condition
        if self.is_guided:
            rows = join_conditions(condition, model.null_condition_for(condition))
        logits = model(rows, images.indices.repeat(len(rows) // len(condition), 1)).float()
        return self.guide(logits, torch.arange(logits.shape[1], device=logits.device))

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """`heldout_acceptance`: the chance that a drafted token is accepted after true ones, on held-out images; the
        overlap of both laws (Leviathan et al. 2023, theorem 3.5)."""
        overlaps = []
        for rows in self.heldout_rows():
            condition, images = self._images(rows)
            drafted = token_probabilities(self._guided(model, condition, images), self.settings.sampling)
            shared = torch.minimum(drafted.gather(2, images.law_tokens), images.law_probs)
            overlaps.append(shared.sum(dim=2))
        return {"heldout_acceptance": torch.cat(overlaps).mean().item()}
