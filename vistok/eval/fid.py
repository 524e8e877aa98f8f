"""Fréchet and kernel distances between two sets of images, with torch-fidelity's own metric code.

The Fréchet distance is that of Heusel et al. 2017 (section 3), the kernel distance the unbiased cubic MMD of Binkowski
et al. 2018 (section 4). Both depend on the number of images, their size and rounding, the extractor and its resize:
a result carries all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from torch import Tensor
from tqdm import tqdm

from vistok.eval.features import FeatureExtractor
from vistok.eval.sources import Source, image_batches, source_length, source_name

KID_LARGEST_SUBSET = 1000  # as published; smaller sets of images are drawn whole
KID_FEWEST_IMAGES = 100  # under this its estimate is mostly noise
PACKAGES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class FeatureSet:
    """The features of one source."""

    source: str
    features: Tensor  # [n d] float32 on the CPU
    image_size: tuple[int, int]  # height and width as given to the extractor

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class FidResult:
    """A distance with its protocol."""

    fid: float
    kid: float | None  # None with fewer than KID_FEWEST_IMAGES images
    kid_subset_size: int | None
    num_real: int
    num_fake: int
    real: str
    fake: str
    real_image_size: tuple[int, int]  # height and width
    fake_image_size: tuple[int, int]
    extractor: str
    weights: str
    weights_sha256: str
    preprocessing: str
    rounding: str
    seed: int
    device: str
    dtype: str
    versions: dict[str, str]
    note: str

    def to_json(self) -> str:
        """One line of JSON with all fields."""
        return json.dumps(asdict(self), allow_nan=False)


def compute_fid(
    real: Source,
    fake: Source,
    *,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    image_size: int | None = None,
    fake_name: str | None = None,
    seed: int = 0,
) -> FidResult:
    """Distance of `fake` images from `real` ones.

    Args:
        real: a folder, uint8 batches `[b 3 H W]`, or a function that returns such batches.
        fake: likewise.
        extractor: the features; see `load_extractor`.
        batch_size: images per batch read from a folder.
        image_size: resize and centre-crop the pictures of folders to this size first.
        fake_name: what the result calls `fake`, such as the model that draws it; otherwise the folder's name.
        seed: of the subsets that KID draws.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: fewer than two images, a damaged one, or images of different sizes in one source.
    """
    real_set = extract_features(real, extractor, batch_size=batch_size, image_size=image_size)
    fake_set = extract_features(fake, extractor, name=fake_name, batch_size=batch_size, image_size=image_size)
    return compare_features(real_set, fake_set, extractor=extractor, seed=seed)


def extract_features(
    source: Source,
    extractor: FeatureExtractor,
    *,
    name: str | None = None,
    batch_size: int = 64,
    image_size: int | None = None,
) -> FeatureSet:
    """Features of all images of a source called `name`; see `compute_fid`. Progress goes to stderr.

    Raises:
        ValueError: the source yields no images, or not as `image_batches` wants them.
    """
    name = name or source_name(source)
    features, size = [], (0, 0)
    with tqdm(total=source_length(source), desc=f"{extractor.name}: {name}", unit="image") as progress:
        for batch in image_batches(source, batch_size, image_size):
            features.append(extractor(batch).float().cpu())
            size = (batch.shape[2], batch.shape[3])
            progress.update(len(batch))
    if not features:
        raise ValueError(f"{name} yields no images")
    return FeatureSet(source=name, features=torch.cat(features), image_size=size)


def compare_features(
    real: FeatureSet, fake: FeatureSet, *, extractor: FeatureExtractor, seed: int = 0
) -> FidResult:
    """The distances of `compute_fid` for features which are there already.

    Raises:
        ValueError: a set with fewer than two images, which has no covariance.
    """
    for images in (real, fake):
        if len(images) < 2:
            raise ValueError(f"{images.source} holds {len(images)} image; a distance needs at least 2")
    kid, kid_subset_size = _kernel_distance(real.features, fake.features, seed)
    return FidResult(
        fid=_frechet_distance(real.features, fake.features),
        kid=kid,
        kid_subset_size=kid_subset_size,
        num_real=len(real),
        num_fake=len(fake),
        real=real.source,
        fake=fake.source,
        real_image_size=real.image_size,
        fake_image_size=fake.image_size,
        extractor=extractor.name,
        weights=extractor.weights,
        weights_sha256=extractor.weights_sha256,
        preprocessing=extractor.preprocessing,
        rounding="uint8, nearest",
        seed=seed,
        device=str(extractor.device),
        dtype="float32",
        versions={package: version(package) for package in PACKAGES},
        note=_note(real, fake, extractor),
    )


def _frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Of two sets of features `[n d]`."""
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    statistics = [fid_features_to_statistics(features) for features in (real, fake)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def _kernel_distance(real: Tensor, fake: Tensor, seed: int) -> tuple[float | None, int | None]:
    """(KID, subset size) of two sets of features `[n d]`: the mean over 100 random subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    fewest = min(len(real), len(fake))
    if fewest < KID_FEWEST_IMAGES:
        return None, None
    size = min(KID_LARGEST_SUBSET, fewest)
    metric = kid_features_to_metric(real, fake, kid_subset_size=size, rng_seed=seed, verbose=False)
    return metric[KEY_METRIC_KID_MEAN], size


def _note(real: FeatureSet, fake: FeatureSet, extractor: FeatureExtractor) -> str:
    """What a reader must know before comparing this number with another."""
    notes = [extractor.remark] if extractor.remark else []
    fewest = min(len(real), len(fake))
    if fewest < extractor.dim:
        notes.append(
            f"{fewest} images are fewer than the {extractor.dim} features: the covariance is rank-deficient, the "
            "distance too large, and comparable only at the same number of images"
        )
    if real.image_size != fake.image_size:
        notes.append(
            f"real images are {real.image_size}, fake ones {fake.image_size} pixels (height, width): the difference "
            "in sharpness counts"
        )
    return "; ".join(notes)
