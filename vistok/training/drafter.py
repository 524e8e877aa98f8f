"""Training an EAGLE drafter for a trained generator, on images that the generator itself makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.sampling import token_probabilities
from vistok.models.drafters.eagle import EagleDrafter
from vistok.training.augment import Augmentation
from vistok.training.drafter_loss import (
    Pairs,
    align,
    feature_loss,
    law_loss,
    masked_mean,
    token_loss,
    unrolled,
)
from vistok.training.target_data import TargetImages
from vistok.training.target_task import TargetOptions, TargetTask

EVALUATED_STEPS = 4


@dataclass(frozen=True)
class DrafterOptions(TargetOptions):
    """Data and losses. The release for LlamaGen has `law_weight` 0, `token_weight` 0.1 and `supervise_first` false."""

    feature_weight: float = 1.0  # smooth L1 between features
    token_weight: float = 0.0  # cross-entropy with the target's own law, of each branch of guidance by itself
    law_weight: float = 1.0  # cross-entropy with the law that is verified: guided and filtered
    num_steps: int = 1  # steps that the drafter is unrolled over
    step_decay: float = 0.8  # how much less each counts than the one before
    feature_noise: float = 0.0  # uniform noise on the features; 0.2 in the release
    supervise_first: bool = True  # the prediction at the first token, too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")


class DrafterTask(TargetTask):
    """The drafter learns to predict what its target reads next, and the law of the token after that.

    Args:
        model: fresh.
        options: data and losses.
        augmentation: none.
        device: where drafter and target are.
        folder: of the run.
        seed: of prompts.

    Raises:
        ValueError: the drafter does not fit the target, or an augmentation.
    """

    def __init__(
        self,
        model: EagleDrafter,
        options: DrafterOptions,
        augmentation: Augmentation,
        device: torch.device,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__(options, augmentation, device)
        self.model: Any = model
        self.options = options
        self._check_fit()
        self.make_images(folder, seed, model.prefix_length)

    def batch(self, batch_size: int, generator: torch.Generator) -> TargetImages:
        """Images at random."""
        return self.images_at(self.draw_rows(batch_size, generator))

    def loss(self, batch: TargetImages) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The weighted losses of all steps, and those of the first."""
        pairs, total = self._pairs(batch), torch.zeros((), device=self.device)
        logs: dict[str, float | Tensor] = {}
        with torch.no_grad():
            target_logits = (
                self.target.features_to_logits(pairs.targets) if self.options.token_weight else None
            )
        for step, predicted in enumerate(self._unrolled(self.model, pairs, self.options.num_steps)):
            losses = self._losses(predicted, pairs, batch, target_logits, step)
            total = total + self.options.step_decay**step * sum(losses.values(), start=torch.zeros(()))
            logs |= {} if step else {name: value.detach() for name, value in losses.items()}
        return total, logs

    def _losses(
        self, predicted: Tensor, pairs: Pairs, batch: TargetImages, target_logits: Tensor | None, step: int
    ) -> dict[str, Tensor]:
        """The weighted losses of a step."""
        options, counted, losses = self.options, pairs.is_supervised(step), {}
        if options.feature_weight:
            loss = feature_loss(predicted.float(), pairs.targets)
            losses["feature_loss"] = options.feature_weight * masked_mean(loss, counted)
        if options.token_weight or options.law_weight:
            logits = self.target.features_to_logits(predicted).float()
        if target_logits is not None:
            loss = token_loss(logits, target_logits.float())
            losses["token_loss"] = options.token_weight * masked_mean(loss, counted)
        if options.law_weight:
            tokens, probs = self._law(batch, pairs)
            loss = law_loss(
                self.guide(logits, self._places(pairs)) / self.settings.temperature, tokens, probs
            )
            losses["law_loss"] = options.law_weight * masked_mean(loss, counted)
        return losses

    def _pairs(self, batch: TargetImages) -> Pairs:
        features = batch.features.transpose(0, 1).flatten(0, 1)  # [r l d], branch by branch
        indices = batch.indices.repeat(batch.features.shape[1], 1)
        first = self.options.supervise_first
        return align(features, indices, self.model.prefix_length, supervise_first=first)

    def _unrolled(self, model: Any, pairs: Pairs, num_steps: int) -> Any:
        own = model.token_embed is not None
        embeds = model.embed_tokens(pairs.tokens) if own else self.target.embed_tokens(pairs.tokens)
        if model.training and self.options.feature_noise:
            length = pairs.features.shape[1]
            noise = (torch.rand_like(pairs.features) - 0.5) * self.options.feature_noise * 512 / length
            pairs = Pairs(pairs.features + noise, pairs.tokens, pairs.targets, pairs.first)
        return unrolled(model, pairs, embeds, num_steps)

    def _places(self, pairs: Pairs) -> Tensor:
        """Of the token that each position of the drafter predicts the law of, `[m]`; those of the condition count as 0."""
        places = torch.arange(pairs.features.shape[1], device=self.device) - self.model.prefix_length + 1
        return places.clamp_min(0)

    def _law(self, batch: TargetImages, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities of the true laws, `[b m k]`."""
        places = self._places(pairs)
        return batch.law_tokens[:, places], batch.law_probs[:, places]

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """How much of what the drafter proposes would be accepted, on held-out images.

        `heldout_acceptance_t` is the chance that the t-th drafted token of a chain is accepted, if those before it were the
        target's: the overlap of both laws (Leviathan et al. 2023, theorem 3.5). `heldout_tokens_per_pass` is what chains of
        `EVALUATED_STEPS` tokens would give, the target's own included.
        """
        overlaps = [self._overlaps(model, self.images_at(rows)) for rows in self.heldout_rows()]
        overlap = torch.cat(overlaps, dim=1)  # [t b m]
        measured = {f"heldout_acceptance_{t + 1}": part.mean().item() for t, part in enumerate(overlap)}
        return measured | {"heldout_tokens_per_pass": 1 + overlap.cumprod(dim=0).sum(dim=0).mean().item()}

    def _overlaps(self, model: Any, batch: TargetImages) -> Tensor:
        """`[t b m]`: for chains from every place that leaves room, the overlap of the laws at each of their tokens."""
        pairs = self._pairs(batch)
        tokens, probs = self._law(batch, pairs)
        num_steps = min(EVALUATED_STEPS, pairs.features.shape[1] - self.model.prefix_length)
        count = pairs.features.shape[1] - self.model.prefix_length - num_steps + 1
        found = []
        for step, predicted in enumerate(self._unrolled(model, pairs, num_steps)):
            logits = self.guide(self.target.features_to_logits(predicted).float(), self._places(pairs))
            drafted = token_probabilities(logits, self.settings.sampling).gather(-1, tokens)
            first = self.model.prefix_length + step
            found.append(torch.minimum(drafted, probs).sum(dim=-1)[:, first : first + count])
        return torch.stack(found)

    def _check_fit(self) -> None:
        """Raises ValueError unless the drafter has the sizes of the target."""
        for name in ("codebook_size", "num_tokens"):
            ours, theirs = getattr(self.model, name), getattr(self.target, name)
            if ours != theirs:
                raise ValueError(
                    f"{name} of the drafter is {ours}, that of {type(self.target).__name__} {theirs}"
                )
        if self.model.config["dim"] != self.target.config["dim"]:
            raise ValueError(
                f"dim of the drafter is {self.model.config['dim']}, that of {type(self.target).__name__} "
                f"{self.target.config['dim']}"
            )
        if self.model.token_embed is not None:
            self.model.token_embed.weight.data.copy_(self.target.token_embed.weight)
