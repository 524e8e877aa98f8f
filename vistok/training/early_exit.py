"""Training the adapter of an early exit for a trained generator, on images that the generator itself makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.sampling import token_probabilities
from vistok.hub import load
from vistok.models.drafters.early_exit import EarlyExitAdapter, with_early_exit
from vistok.models.generators.base import join_conditions
from vistok.training.augment import Augmentation
from vistok.training.drafter import target_settings
from vistok.training.drafter_loss import law_loss
from vistok.training.target_data import Making, TargetImages, load_or_make, make_conditions
from vistok.training.trainer import Task

EVALUATION_BATCH = 32


@dataclass(frozen=True)
class EarlyExitOptions:
    """Data of an adapter training."""

    target: str  # a trained generator or its pipeline, by the name or folder that `vistok.load` takes
    prompts: str | None = (
        None  # of a text target: the emoji set's folder, or a file with one prompt in every line
    )
    images: str | None = (
        None  # folder that keeps what the target made, for several runs; the run's own by default
    )
    num_images: int = 5000
    images_per_shard: int = 256
    heldout_images: int = 256  # measure on the last so many of them
    guidance_scale: float | None = (
        None  # the settings of the pipeline, or plain sampling, where nothing is said
    )
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    law_size: int = 64  # most tokens of every law that are kept

    def __post_init__(self) -> None:
        if not 0 < self.heldout_images < self.num_images:
            raise ValueError(
                f"heldout_images must be in 1..{self.num_images - 1}, of {self.num_images} images; got {self.heldout_images}"
            )


class EarlyExitTask(Task):
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
        options: EarlyExitOptions,
        augmentation: Augmentation,
        device: torch.device,
        folder: Path,
        seed: int,
    ) -> None:
        if augmentation != Augmentation():
            raise ValueError("images of the target are not augmented; leave out the augmentation")
        self.model: Any = model
        self.options = options
        self.device = device
        loaded = load(options.target, device=device)
        self.target = getattr(loaded, "transformer", loaded).requires_grad_(False)
        model.check_target(self.target)
        self.settings = target_settings(loaded, options)
        making = Making(self.target, self.settings.fitted(self.target), 0, options.law_size)
        prompts = None if options.prompts is None else Path(options.prompts)
        self.conditions = make_conditions(self.target, prompts, options.num_images, seed)
        images = Path(options.images) if options.images is not None else folder / "images"
        self.images = load_or_make(making, self.conditions, images, options.images_per_shard)

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, TargetImages]:
        """Images at random, and what they were drawn from."""
        most = self.options.num_images - self.options.heldout_images
        return self._images(torch.randint(most, (batch_size,), generator=generator))

    def _images(self, chosen: Tensor) -> tuple[Tensor, TargetImages]:
        return self.conditions[chosen].to(self.device), self.images.rows(chosen).to(self.device)

    def loss(self, batch: tuple[Tensor, TargetImages]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Mean cross-entropy per token in nats."""
        logits = self._guided(self.model, *batch) / self.settings.temperature
        return law_loss(logits, batch[1].law_tokens, batch[1].law_probs).mean(), {}

    def _guided(self, adapter: EarlyExitAdapter, condition: Tensor, images: TargetImages) -> Tensor:
        """Logits of the early exit at all tokens, `[b n v]` float32."""
        model = with_early_exit(self.target, adapter)
        guidance, order = self.settings.guidance(model.order), model.order
        if guidance.scale == 1.0:
            return model(condition, images.indices).float()
        rows = join_conditions(condition, model.null_condition_for(condition))
        cond, uncond = model(rows, images.indices.repeat(2, 1)).float().chunk(2)
        scales = [guidance.at(step, order.num_steps) for step in range(order.num_steps)]
        return uncond + torch.tensor(scales, device=self.device)[:, None] * (cond - uncond)

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """`heldout_acceptance`: the chance that a drafted token is accepted after true ones, on held-out images; the
        overlap of both laws (Leviathan et al. 2023, theorem 3.5)."""
        overlaps = []
        first, last = self.options.num_images - self.options.heldout_images, self.options.num_images
        for start in range(first, last, EVALUATION_BATCH):
            condition, images = self._images(torch.arange(start, min(start + EVALUATION_BATCH, last)))
            drafted = token_probabilities(self._guided(model, condition, images), self.settings.sampling)
            shared = torch.minimum(drafted.gather(2, images.law_tokens), images.law_probs)
            overlaps.append(shared.sum(dim=2))
        return {"heldout_acceptance": torch.cat(overlaps).mean().item()}
