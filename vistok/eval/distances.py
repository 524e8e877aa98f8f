"""Perceptual distances between pictures, each chosen by name and never replaced by another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from vistok.eval.features import FeatureExtractor, load_extractor
from vistok.eval.sources import to_float

Measure = Callable[[Tensor], Tensor]
"""Images, uint8 `[b 3 H W]` -> their distance from the reference, `[b]`; 0 if they look alike."""


class Distance(Protocol):
    """A distance between pictures."""

    name: str
    description: str  # network, weights and preprocessing, in words

    def to(self, reference: Tensor) -> Measure:
        """Measures distances from `reference`, uint8 `[b 3 H W]`."""
        ...


class FeatureDistance:
    """One minus the cosine of two pictures' features; the extractor gives it its name."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self.name = extractor.name
        self.description = (
            f"1 - cosine of {extractor.name}'s {extractor.dim} features; weights {extractor.weights}, "
            f"{extractor.preprocessing}"
        )

    def to(self, reference: Tensor) -> Measure:
        """See `Distance`."""
        wanted = self.extractor(reference).double()  # [b d]
        return lambda images: 1 - F.cosine_similarity(self.extractor(images).double(), wanted, dim=1)


class Lpips:
    """LPIPS with VGG-16 (Zhang et al. 2018), see `vistok.models.upstream.lpips`."""

    name = "lpips"
    description = "LPIPS with VGG-16, torch-fidelity's network and the published weights"

    def __init__(self, device: str = "cpu") -> None:
        from vistok.models.upstream.lpips import load_lpips

        self.network = load_lpips(device)

    def to(self, reference: Tensor) -> Measure:
        """See `Distance`."""
        wanted = to_float(reference)
        return lambda images: self.network(to_float(images), wanted).reshape(-1).double().cpu()


DISTANCES = ("lpips", "efficientnet-lite0")


def load_distance(name: str, device: str = "cpu") -> Distance:
    """The distance called `name`, one of DISTANCES.

    Raises:
        ValueError: another name.
        FileNotFoundError, ModuleNotFoundError: its weights are not here and cannot be had; says which are missing.
    """
    if name == "lpips":
        return Lpips(device)
    if name == "efficientnet-lite0":
        return FeatureDistance(load_extractor(name, device=device))
    raise ValueError(f"unknown distance {name!r}; choose from {', '.join(DISTANCES)}")
