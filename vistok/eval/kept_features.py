"""Features of real images, kept in a file for the next call."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vistok.eval.features import FeatureExtractor
from vistok.eval.fid import FeatureSet, extract_features
from vistok.files import atomic_path

BATCH_SIZE = 64


def kept_features(images: Tensor, extractor: FeatureExtractor, *, name: str, folder: Path) -> FeatureSet:
    """Features of `images` uint8 `[n 3 H W]`, from a file in `folder` if these images were seen before.

    Args:
        images: the images.
        extractor: of the features.
        name: what the result calls them.
        folder: exists.
    """
    size = (images.shape[2], images.shape[3])
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    path = folder / f"real-{extractor.name}-{digest[:16]}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            return FeatureSet(name, file.get_tensor("features"), size)
    features = extract_features(images.split(BATCH_SIZE), extractor, name=name)
    with atomic_path(path) as partial:
        save_file({"features": features.features}, partial)
    return features
