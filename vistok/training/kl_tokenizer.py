"""Training a continuous tokenizer on images: reconstruction, and a posterior near the standard normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.training.augment import Augmentation, augment
from vistok.training.tokenizer import ReconstructionTask, TokenizerOptions, psnr_from_mse

SCALE_IMAGES = 2048  # training images whose latents decide the scaling factor


@dataclass(frozen=True)
class KLTokenizerOptions(TokenizerOptions):
    """Data and loss of a `KLTokenizer`; its length is fixed."""

    kl: float = (
        1e-6  # weight of the divergence from the standard normal, per token (Rombach et al. 2022, section G)
    )


class KLTokenizerTask(ReconstructionTask):
    """Reconstruction from latents drawn from the posterior; measured with its mode, as `encode` gives it."""

    options: KLTokenizerOptions

    def encoding_parts(self) -> tuple[nn.Module, ...]:
        autoencoder = self.model.autoencoder
        return autoencoder.encoder, *filter(None, [autoencoder.quant_conv])

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images `[b 3 H W]` and the noise of their latents `[b c h w]`."""
        images = self.draw_images(batch_size, generator)
        noise = torch.randn(batch_size, *self.model.latent_shape, generator=generator)
        return images, noise.to(self.device)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`reconstruction_loss` and the weighted divergence; logs the PSNR and the divergence, in nats per token."""
        images, noise = batch
        reconstruction, posterior = self.model(images, noise)
        loss, logs = self.reconstruction_loss(reconstruction, images)
        divergence = posterior.kl().mean()
        return loss + self.options.kl * divergence, {**logs, "kl": divergence.detach()}

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Held-out PSNR (mean over images, dB) and divergence (nats per token)."""
        psnr, divergence = [], []
        for images in self.heldout_batches():
            error = (model.decode(model.encode(images)) - images).square().mean(dim=(1, 2, 3))
            psnr.append(psnr_from_mse(error))
            divergence.append(model.posterior(images).kl().mean(dim=(1, 2)))
        return {
            "heldout_psnr": torch.cat(psnr).mean().item(),
            "heldout_kl": torch.cat(divergence).mean().item(),
        }

    @torch.inference_mode()
    def finish(self, model: Any) -> None:
        """Record the scaling factor: one over the standard deviation of all latents (Rombach et al. 2022, section G)."""
        plain, generator = Augmentation(), torch.Generator().manual_seed(0)  # nothing but the size is changed
        latents = []
        for few in self.images[:SCALE_IMAGES].split(64):
            images = augment(few.float() / 127.5 - 1, plain, model.image_size, generator)
            latents.append(model.encode(images.to(self.device)).data)
        model.scaling_factor = round(1 / torch.cat(latents).std().item(), 4)
        model.register_to_config(scaling_factor=model.scaling_factor)
