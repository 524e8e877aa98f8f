"""How well a tokenizer gives images back: PSNR, SSIM and the use of its codebook."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vistok.data.images import image_files
from vistok.eval.features import check_uint8
from vistok.eval.sources import image_batches, source_name, to_float, to_uint8
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens

DATA_RANGE = 255
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


@dataclass(frozen=True)
class ReconstructionResult:
    """Means over images, with the protocol."""

    psnr: float  # dB; infinite when every image comes back exactly
    ssim: float
    codebook_usage: float | None  # share of the codes used at least once; None for a continuous tokenizer
    codebook_entropy: float | None  # bits, of the codes' frequencies
    codebook_size: int | None
    tokens_per_image: float
    num_images: int
    image_size: int
    source: str
    tokenizer: str
    rounding: str
    device: str
    dtype: str

    def to_json(self) -> str:
        """One line of JSON with all fields."""
        return json.dumps(asdict(self))


@torch.inference_mode()
def evaluate_reconstruction(
    tokenizer: ImageTokenizer, folder: Path | str, batch_size: int = 64
) -> ReconstructionResult:
    """Encode and decode every picture under `folder`, resized and centre-cropped to the tokenizer's size.

    PSNR and SSIM compare uint8 images (data range 255): the reconstruction is rounded as a saved picture would be.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a folder without images, or a damaged one.
    """
    usage = CodebookUsage(tokenizer.codebook_size)
    psnrs, ssims = [], []
    with tqdm(total=len(image_files(folder)), desc="reconstruct", unit="image") as progress:
        for originals in image_batches(folder, batch_size, tokenizer.image_size):
            tokens = tokenizer.encode(to_float(originals).to(tokenizer.device))
            reconstructions = to_uint8(tokenizer.decode(tokens))
            usage.add(tokens)
            psnrs.append(psnr(reconstructions, originals))
            ssims.append(ssim(reconstructions, originals))
            progress.update(len(originals))
    return ReconstructionResult(
        psnr=torch.cat(psnrs).mean().item(),
        ssim=torch.cat(ssims).mean().item(),
        codebook_usage=usage.share,
        codebook_entropy=usage.entropy,
        codebook_size=tokenizer.codebook_size,
        tokens_per_image=usage.num_tokens / usage.num_images,
        num_images=usage.num_images,
        image_size=tokenizer.image_size,
        source=source_name(folder),
        tokenizer=type(tokenizer).__name__,
        rounding="uint8, nearest; data range 255",
        device=str(tokenizer.device),
        dtype=str(tokenizer.dtype).removeprefix("torch."),
    )


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, `[b]` float64, of uint8 images `[b 3 H W]`; infinite if equal."""
    _check_pair(images, reference)
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / mse)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per image (Wang et al. 2004, section III), `[b]` float64, of uint8 images `[b 3 H W]`.

    Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, windows inside the image only, mean over the RGB
    channels and positions; images are not downsampled first.

    Raises:
        ValueError: other shapes or dtypes, or images smaller than the window.
    """
    _check_pair(images, reference)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} pixels per side, got {list(images.shape[2:])}")
    x, y = images.double(), reference.double()
    mean_x, mean_y = _gaussian_means(x), _gaussian_means(y)
    variance_x = _gaussian_means(x * x) - mean_x**2
    variance_y = _gaussian_means(y * y) - mean_y**2
    covariance = _gaussian_means(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)  # eq. 13: contrast times structure
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_means(images: Tensor) -> Tensor:
    """Weighted means of all windows inside the images: `[b 3 H W]` -> `[b 3 H-10 W-10]`."""
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    rows = F.conv2d(images, weights, groups=3)
    return F.conv2d(rows, weights.transpose(2, 3), groups=3)


def _check_pair(images: Tensor, reference: Tensor) -> None:
    check_uint8(images)
    check_uint8(reference)
    if images.shape != reference.shape:
        raise ValueError(f"images {list(images.shape)} and reference {list(reference.shape)} differ in shape")


class CodebookUsage:
    """Counts the codes of batches of tokens; padding does not count. Continuous tokens are only numbered.

    Args:
        codebook_size: `None` for a continuous tokenizer.
    """

    def __init__(self, codebook_size: int | None) -> None:
        self.counts = None if codebook_size is None else torch.zeros(codebook_size, dtype=torch.int64)
        self.num_images = 0
        self.num_tokens = 0

    def add(self, tokens: Tokens) -> None:
        """Count a batch."""
        lengths = tokens.token_counts
        self.num_images += len(tokens)
        self.num_tokens += int(lengths.sum())
        if self.counts is not None:
            kept = torch.arange(tokens.data.shape[1], device=lengths.device) < lengths[:, None]  # [b n]
            self.counts += torch.bincount(tokens.data[kept].cpu(), minlength=len(self.counts))

    @property
    def share(self) -> float | None:
        """Share of the codebook that occurs."""
        return None if self.counts is None else (self.counts > 0).float().mean().item()

    @property
    def entropy(self) -> float | None:
        """Bits per token if codes were drawn independently; at most log2 of the codebook's size."""
        if self.counts is None:
            return None
        frequencies = (self.counts[self.counts > 0] / self.counts.sum()).tolist()
        return -sum(share * math.log2(share) for share in frequencies)
