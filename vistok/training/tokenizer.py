"""Training a discrete tokenizer on images: reconstruction, with the use of the codebook logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.data.images import load_folder
from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.training.augment import Augmentation, augment


@dataclass(frozen=True)
class TokenizerOptions:
    """Data and loss of a tokenizer training."""

    train: str  # folder of training images
    heldout: str  # folder of held-out images
    source_size: int = 128  # images are kept at this size and augmented before they are reduced
    mse: float = 1.0
    l1: float = 0.2


class TokenizerTask:
    """Reconstruction of augmented images; measured on the held-out ones without augmentation."""

    def __init__(
        self, model: ConvTiTok, options: TokenizerOptions, augmentation: Augmentation, device: torch.device
    ) -> None:
        self.model: Any = model
        self.options = options
        self.augmentation = augmentation
        self.device = device
        self.images = load_folder(Path(options.train), options.source_size)  # [n 3 s s] uint8
        self.heldout = load_folder(Path(options.heldout), model.image_size)

    def batch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Augmented images `[b 3 H W]`."""
        chosen = torch.randint(len(self.images), (batch_size,), generator=generator)
        images = self.images[chosen].float() / 127.5 - 1
        images = augment(images, self.augmentation, self.model.image_size, generator)
        return images.to(self.device, memory_format=torch.channels_last)

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Weighted squared and absolute error; logs the PSNR and the distinct codes of the batch."""
        reconstruction, indices = self.model(batch)
        reconstruction = reconstruction.float()
        mse = F.mse_loss(reconstruction, batch)
        loss = self.options.mse * mse + self.options.l1 * F.l1_loss(reconstruction, batch)
        used = len(indices.unique()) / min(indices.numel(), self.model.quantizer.codebook_size)
        return loss, {"psnr": psnr_from_mse(mse.detach()), "batch_codes_used": used}

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Held-out PSNR (mean over images, dB) and the share of the codebook that the held-out images use."""
        psnr, used = [], torch.zeros(model.codebook_size, dtype=torch.bool)
        for images in self.heldout.split(64):
            images = (images.float() / 127.5 - 1).to(self.device)
            tokens = model.encode(images)
            error = (model.decode(tokens) - images).square().mean(dim=(1, 2, 3))
            psnr.append(psnr_from_mse(error))
            used[tokens.data.flatten().cpu()] = True
        return {
            "heldout_psnr": torch.cat(psnr).mean().item(),
            "heldout_codebook_usage": used.float().mean().item(),
        }


def psnr_from_mse(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error between images in [-1, 1]."""
    return 10 * torch.log10(4 / mse)
