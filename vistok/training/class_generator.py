"""Training a class-conditional generator of any kind on tokenized CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.models.generators.any_order import AnyOrderAR
from vistok.models.generators.base import ContinuousGenerator, Generator, MaskedGenerator
from vistok.models.generators.mar import MAR
from vistok.models.generators.xar import XAR
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.fit import check_fit
from vistok.training.augment import Augmentation
from vistok.training.continuous import flow_objective, masked_diffusion_objective
from vistok.training.labelled_tokens import LabelledTokens, load_or_tokenize
from vistok.training.masked import MaskedObjective, drop_labels
from vistok.training.trainer import Task

EVALUATION_BATCH = 100


@dataclass(frozen=True)
class ClassGeneratorOptions:
    """Data of a class-conditional training."""

    tokenizer: str  # a trained tokenizer, by the name or folder that `vistok.load` takes
    cifar10: str  # folder of CIFAR-10, see vistok.data.cifar10
    tokens: str | None = (
        None  # folder that keeps the tokenized images, for several runs; the run's own by default
    )
    label_dropout: float = 0.1  # share of samples without class, for classifier-free guidance
    heldout_images: int = 1000  # measure on the first so many test images
    random_orders: bool = False  # of an AnyOrderAR: a random order for every image instead of the model's own


class Objective(Protocol):
    """What differs between kinds of generators: what a batch draws besides its tokens, the loss, the measure."""

    def draw(self, tokens: Tensor, generator: torch.Generator, /) -> tuple[Tensor, ...]:
        """What the loss needs besides labels and tokens, rows first."""
        ...

    def loss(
        self, model: Any, labels: Tensor, tokens: Tensor, /, *drawn: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Scalar loss and what to log beside it."""
        ...

    def measure(self, model: Any, labels: Tensor, tokens: Tensor, /, *drawn: Tensor) -> dict[str, Tensor]:
        """Held-out losses per image `[b]`; of codes in nats per token."""
        ...


class OrderedObjective:
    """Cross-entropy of every token given those that the order decides before it: the chain rule.

    So `heldout_nll` is the exact negative log-likelihood per token in that order, and orders can be compared by it.
    """

    def draw(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return ()

    def loss(
        self, model: Any, labels: Tensor, indices: Tensor, *orders: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        return self._nll(model, labels, indices, *orders).mean(), {}

    def measure(self, model: Any, labels: Tensor, indices: Tensor, *orders: Tensor) -> dict[str, Tensor]:
        return {"heldout_nll": self._nll(model, labels, indices, *orders).mean(dim=1)}

    def _nll(self, model: Any, labels: Tensor, indices: Tensor, *orders: Tensor) -> Tensor:
        logits = model(labels, indices, *orders)  # [b n v]
        loss = F.cross_entropy(logits.float().flatten(0, 1), indices.flatten(), reduction="none")
        return loss.view_as(indices)  # [b n]


class RandomOrderObjective(OrderedObjective):
    """The same with a random permutation for every image (RAR, Yu et al. 2024, section 3.2), of an `AnyOrderAR`."""

    def draw(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The step at which each position is decided, `[b n]`."""
        return (torch.rand(indices.shape, generator=generator).argsort(dim=1),)


class ClassGeneratorTask(Task):
    """Tokens of CIFAR-10 given their class, for every kind of class-conditional generator.

    Args:
        model: an `OrderedGenerator` or a `MaskedGenerator` with `num_classes`, or a `ContinuousGenerator`.
        tokenizer: that of `options`.
        options: data.
        augmentation: its `flip` is the probability that an image is mirrored; nothing else is varied.
        device: where the model is trained.
        folder: of the run.

    Raises:
        ValueError: the model does not fit the tokenizer or the ten classes, or an augmentation besides `flip`.
    """

    def __init__(
        self,
        model: Generator,
        tokenizer: ImageTokenizer,
        options: ClassGeneratorOptions,
        augmentation: Augmentation,
        device: torch.device,
        folder: Path,
    ) -> None:
        if augmentation != Augmentation(flip=augmentation.flip):
            raise ValueError("tokens of CIFAR-10 can only be flipped; leave out the other augmentations")
        check_fit(tokenizer, model)
        self.model: Any = model
        self.options = options
        self.flip = augmentation.flip
        self.device = device
        self.objective: Objective = objective_for(model, options.random_orders)
        self.null_label = null_label(model)
        self.train, heldout = load_or_tokenize(tokenizer, options.cifar10, Path(options.tokens or folder))
        _check_labels(self.train, self.model.num_classes)
        self.heldout = _first(heldout, options.heldout_images)

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Labels `[b]`, some of them dropped, tokens as `LabelledTokens` has them, and what the objective draws."""
        chosen = torch.randint(len(self.train), (batch_size,), generator=generator)
        is_flipped = torch.rand(batch_size, 1, generator=generator) < self.flip
        plain, flipped = self.train.plain[chosen], self.train.flipped[chosen]
        tokens = torch.where(is_flipped[..., None] if plain.ndim == 3 else is_flipped, flipped, plain)
        rand = torch.rand(batch_size, generator=generator)
        labels = drop_labels(self.train.labels[chosen], rand, self.null_label, self.options.label_dropout)
        drawn = self.objective.draw(tokens, generator)
        return tuple(part.to(self.device) for part in (labels, tokens, *drawn))

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The objective's loss."""
        return self.objective.loss(self.model, *batch)

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """The objective's measures on held-out images given their classes; the same draws every time."""
        generator = torch.Generator().manual_seed(0)
        measured: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.heldout), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            tokens = self.heldout.plain[rows]
            batch = (self.heldout.labels[rows], tokens, *self.objective.draw(tokens, generator))
            values = self.objective.measure(model, *(part.to(self.device) for part in batch))
            for name, value in values.items():
                measured.setdefault(name, []).append(value)
        return {name: torch.cat(parts).mean().item() for name, parts in measured.items()}


def objective_for(model: Generator, random_orders: bool) -> Objective:
    """How a generator of this kind is trained.

    Raises:
        ValueError: `random_orders` for a model that has an order of its own, or none.
    """
    if random_orders and not isinstance(model, AnyOrderAR):
        raise ValueError(
            f"random_orders is for an AnyOrderAR; a {type(model).__name__} cannot follow any order"
        )
    if isinstance(model, MaskedGenerator):
        return MaskedObjective(model.mask_token_id)
    if isinstance(model, XAR):
        return flow_objective(model)
    if isinstance(model, MAR):
        return masked_diffusion_objective(model)
    return RandomOrderObjective() if random_orders else OrderedObjective()


def null_label(model: Any) -> int:
    """The label that means "no class"."""
    if isinstance(model, MaskedGenerator | ContinuousGenerator):
        return model.null_label
    return int(model.null_condition(1))


def _check_labels(data: LabelledTokens, num_classes: int) -> None:
    if int(data.labels.max()) >= num_classes:
        raise ValueError(
            f"the images have classes up to {int(data.labels.max())}, the model {num_classes} of them"
        )


def _first(data: LabelledTokens, count: int) -> LabelledTokens:
    return LabelledTokens(data.plain[:count], data.flipped[:count], data.labels[:count])
