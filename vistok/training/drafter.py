"""Training an EAGLE drafter for a trained generator, on images that the generator itself makes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.sampling import token_probabilities
from vistok.hub import load
from vistok.models.drafters.eagle import EagleDrafter
from vistok.pipelines.settings import OrderedSettings
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
from vistok.training.target_data import Making, TargetImages, load_or_make, make_conditions
from vistok.training.trainer import Task

EVALUATED_STEPS = 4
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class DrafterOptions:
    """Data and losses. The release for LlamaGen has `law_weight` 0, `token_weight` 0.1 and `supervise_first` false."""

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
    feature_weight: float = 1.0  # smooth L1 between features
    token_weight: float = 0.0  # cross-entropy with the target's own law, of each branch of guidance by itself
    law_weight: float = 1.0  # cross-entropy with the law that is verified: guided and filtered
    num_steps: int = 1  # steps that the drafter is unrolled over
    step_decay: float = 0.8  # how much less each counts than the one before
    feature_noise: float = 0.0  # uniform noise on the features; 0.2 in the release
    supervise_first: bool = True  # the prediction at the first token, too

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 < self.heldout_images < self.num_images:
            raise ValueError(
                f"heldout_images must be in 1..{self.num_images - 1}, of {self.num_images} images; got {self.heldout_images}"
            )


class DrafterTask(Task):
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
        if augmentation != Augmentation():
            raise ValueError("images of the target are not augmented; leave out the augmentation")
        self.model: Any = model
        self.options = options
        self.device = device
        loaded = load(options.target, device=device)
        self.target = getattr(loaded, "transformer", loaded).requires_grad_(False)
        self.settings = target_settings(loaded, options)
        making = Making(self.target, self.settings.fitted(self.target), model.prefix_length, options.law_size)
        self._check_fit()
        prompts = None if options.prompts is None else Path(options.prompts)
        conditions = make_conditions(self.target, prompts, options.num_images, seed)
        images = Path(options.images) if options.images is not None else folder / "images"
        self.images = load_or_make(making, conditions, images, options.images_per_shard)
        guidance, order = self.settings.guidance(self.target.order), self.target.order
        scales = [guidance.at(step, order.num_steps) for step in range(order.num_steps)]
        self.scales = torch.tensor(scales, device=device)
        self.is_guided = guidance.scale != 1.0

    def batch(self, batch_size: int, generator: torch.Generator) -> TargetImages:
        """Images at random."""
        most = self.options.num_images - self.options.heldout_images
        chosen = torch.randint(most, (batch_size,), generator=generator)
        return self.images.rows(chosen).to(self.device)

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
            loss = law_loss(self._guided(logits, pairs) / self.settings.temperature, tokens, probs)
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

    def _guided(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """`[r m v]` -> `[b m v]`"""
        if not self.is_guided:
            return logits
        cond, uncond = logits.chunk(2)
        return uncond + self.scales[self._places(pairs)][:, None] * (cond - uncond)

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
        overlaps: list[Tensor] = []
        options = self.options
        for start in range(options.num_images - options.heldout_images, options.num_images, EVALUATION_BATCH):
            chosen = torch.arange(start, min(start + EVALUATION_BATCH, options.num_images))
            overlaps.append(self._overlaps(model, self.images.rows(chosen).to(self.device)))
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
            logits = self._guided(self.target.features_to_logits(predicted).float(), pairs)
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


def target_settings(loaded: Any, options: Any) -> OrderedSettings:
    """How the target is sampled: as its pipeline does, but for what the options say under the names of its settings."""
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if hasattr(loaded, "transformer"):
        return OrderedSettings(**loaded.sampling_settings(**given))
    return OrderedSettings(**(asdict(OrderedSettings()) | given))
