"""What trainings of drafters have in common: a target that is not trained, and the images that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.guidance import apply_guidance
from vistok.hub import load
from vistok.models.identity import model_identity
from vistok.pipelines.settings import OrderedSettings
from vistok.training.augment import Augmentation
from vistok.training.target_data import Making, TargetImages, load_or_make, make_conditions
from vistok.training.trainer import Task

EVALUATION_BATCH = 32
SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p")  # of the target, as options name them


@dataclass(frozen=True)
class TargetOptions:
    """The target and what it makes.

    Raises:
        ValueError: more images held out than there are.
    """

    target: str  # a trained generator or its pipeline, by the name or folder that `vistok.load` takes
    prompts: str | None = (
        None  # of a text target: the emoji set's folder, or a file with a prompt in every line
    )
    images: str | None = (
        None  # folder that keeps what the target made, for several runs; the run's by default
    )
    num_images: int = 5000
    images_per_shard: int = 256
    heldout_images: int = 256  # measure on the last so many of them
    guidance_scale: float | None = None  # where nothing is said, that of the pipeline, or plain sampling
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    law_size: int = 64  # most tokens of every law that are kept

    def __post_init__(self) -> None:
        if not 0 < self.heldout_images < self.num_images:
            raise ValueError(
                f"heldout_images must be in 1..{self.num_images - 1}, of {self.num_images} images; "
                f"got {self.heldout_images}"
            )


class TargetTask(Task):
    """A target with its images. A subclass sets `model`, checks that it fits `target`, and calls `make_images`.

    Args:
        options: the target and what it makes.
        augmentation: none.
        device: where the target is.

    Raises:
        ValueError: an augmentation.
    """

    def __init__(self, options: TargetOptions, augmentation: Augmentation, device: torch.device) -> None:
        if augmentation != Augmentation():
            raise ValueError("images of the target are not augmented; leave out the augmentation")
        self.target_options = options
        self.device = device
        loaded = load(options.target, device=device)
        self.target = getattr(loaded, "transformer", loaded).requires_grad_(False)
        self.settings = _settings(loaded, options)
        guidance, order = self.settings.guidance(self.target.order), self.target.order
        scales = [guidance.at(step, order.num_steps) for step in range(order.num_steps)]
        self.scales = torch.tensor(scales, device=device)  # [n], of the token at each place
        self.is_guided = guidance.scale != 1.0

    def make_images(self, folder: Path, seed: int, prefix_length: int) -> None:
        """Make the images, or find them, in `folder` unless the options name another; `prefix_length` as in `Making`."""
        options = self.target_options
        making = Making(self.target, self.settings.fitted(self.target), prefix_length, options.law_size)
        prompts = None if options.prompts is None else Path(options.prompts)
        self.conditions: Tensor = make_conditions(self.target, prompts, options.num_images, seed)
        images = Path(options.images) if options.images is not None else folder / "images"
        self.images = load_or_make(making, self.conditions, images, options.images_per_shard)

    def finish(self, model: Any) -> None:
        """Record which target the drafter was trained for."""
        model.register_to_config(target=model_identity(self.target))

    def draw_rows(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Which of the training images make a batch, `[b]`."""
        most = self.target_options.num_images - self.target_options.heldout_images
        return torch.randint(most, (batch_size,), generator=generator)

    def heldout_rows(self) -> Iterator[Tensor]:
        """Which images are measured on, batch by batch."""
        last = self.target_options.num_images
        yield from torch.arange(last - self.target_options.heldout_images, last).split(EVALUATION_BATCH)

    def images_at(self, rows: Tensor) -> TargetImages:
        """Some of the images, on the device."""
        return self.images.rows(rows).to(self.device)

    def guide(self, logits: Tensor, places: Tensor) -> Tensor:
        """Logits `[r m v]` of all branches, guided as the target's are at `places [m]`: `[b m v]`."""
        if not self.is_guided:
            return logits
        cond, uncond = logits.chunk(2)
        return apply_guidance(cond, uncond, self.scales[places][:, None])


def _settings(loaded: Any, options: TargetOptions) -> OrderedSettings:
    """How the target is sampled: as its pipeline does, but for what the options say."""
    given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    if hasattr(loaded, "transformer"):
        return OrderedSettings(**loaded.sampling_settings(**given))
    return OrderedSettings(**(asdict(OrderedSettings()) | given))
