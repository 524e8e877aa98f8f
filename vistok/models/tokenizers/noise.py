"""Normal noise for a batch of images, from one generator per image, one for all, or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
DEFAULT_SEED = 0


def normal_noise(num_images: int, shape: Sequence[int], generator: Generators = None) -> Tensor:
    """Standard normal `[b *shape]`, float32, on the device of the generators (the CPU for `None`).

    Args:
        num_images: size of the batch.
        shape: of the noise of one image.
        generator: one per image, so that an image does not depend on its batch; or one that is drawn from image by
            image; or `None` for the same noise, that of seed 0, for every image: a result then depends on nothing
            but its input.

    Raises:
        ValueError: the number of generators is not that of images.
    """
    if generator is None:
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(DEFAULT_SEED))
        return noise.expand(num_images, *shape)
    generators = [generator] * num_images if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != num_images:
        raise ValueError(f"{len(generators)} generators were given for {num_images} images")
    if not generators:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in generators])
