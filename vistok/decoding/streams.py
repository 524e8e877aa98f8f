"""One random stream per image, so that a result depends on its own seed and on nothing else in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class UniformSource(Protocol):
    """Where samplers get their randomness."""

    def uniform(self, *shape: int) -> Tensor:
        """Fresh draws in [0, 1), `[b *shape]` float32 on the CPU."""
        ...


class NormalSource(Protocol):
    """Where continuous samplers get their randomness."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh standard normal draws, `[b *shape]` on the CPU."""
        ...


class ImageStreams:
    """Independent streams, one per image of a batch.

    Args:
        generators: one CPU `torch.Generator` per image.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> ImageStreams:
        """One stream per seed; equal seeds give equal streams."""
        return cls([torch.Generator().manual_seed(seed) for seed in seeds])

    def uniform(self, *shape: int) -> Tensor:
        """Fresh draws in [0, 1), `[b *shape]` float32 on the CPU."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh standard normal draws, `[b *shape]` on the CPU."""
        draws = [torch.randn(shape, generator=generator, dtype=dtype) for generator in self.generators]
        return torch.stack(draws)

    def seeds(self) -> list[int]:
        """One seed drawn from every stream, for samplers that take a `torch.Generator` per image."""
        return [
            int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
            for generator in self.generators
        ]


def to_device(draws: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, copied to `device` without the host waiting for what the device does just now."""
    return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)


class StepNoise:
    """Noise for the tokens of one step, `[b *shape]` on a device; the `Draw` of a head."""

    def __init__(self, streams: NormalSource, shape: tuple[int, int], device: torch.device) -> None:
        self.streams = streams
        self.shape = shape
        self.device = device

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return to_device(self.streams.normal(*self.shape, dtype=dtype), self.device)
