"""LPIPS with VGG-16 (Zhang et al. 2018): torch-fidelity's network with the published weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

VGG16_HASH = (
    "397923af"  # the first digits of the file's SHA-256; the weights of LPIPS have none in their name
)


def load_lpips(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS as a function of two batches of images `[b 3 H W]` in [-1, 1], which gives `[b]`; 0 if they look alike.

    Images are compared as they would be saved, with 8 bits. Weights are looked up in torch's hub folder and downloaded
    on first use: VGG-16 (528 MB) and the weights of its layers.

    Raises:
        FileNotFoundError: weights which are not here and cannot be downloaded; says which file to put where.
        ValueError: a file with other contents.
    """
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights

    for url, digits in ((VGG16_Weights.IMAGENET1K_V1.url, VGG16_HASH), (URL_VGG16_LPIPS, None)):
        _check_plain_weights(_weights_file(url, digits))
    network = SampleSimilarityLPIPS("lpips").to(device)

    @torch.inference_mode()
    def distance(reconstructions: Tensor, images: Tensor) -> Tensor:
        return network(_to_8_bits(reconstructions, device), _to_8_bits(images, device))

    return distance


def _to_8_bits(images: Tensor, device: torch.device | str) -> Tensor:
    return ((images.to(device).float() + 1) * 127.5).round().clamp(0, 255)


def _weights_file(url: str, hash_prefix: str | None) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix)
    except (OSError, RuntimeError) as error:  # no network, no permission; or another file came
        raise FileNotFoundError(
            f"LPIPS needs {path.name}, and it could not be downloaded from {url} ({error}). Put it at {path}, "
            "or measure with a distance of your own (`perceptual_distance`)"
        ) from None
    return path


def _check_plain_weights(path: Path) -> None:
    """torch-fidelity and torchvision unpickle without restriction, so each file is read once in the safe way before."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file which is no checkpoint
        raise ValueError(f"{path} is not a file of plain weights ({type(error).__name__})") from None
