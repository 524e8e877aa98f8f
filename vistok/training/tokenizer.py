"""Training a tokenizer on images: reconstruction, and of a discrete one the use of the codebook."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.data.cifar10 import load_cifar10
from vistok.data.images import load_folder
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.training.augment import Augmentation, augment
from vistok.training.perceptual import PerceptualLoss
from vistok.training.trainer import Task


@dataclass(frozen=True)
class TokenizerOptions:
    """Data and loss of a tokenizer training. The data is either two folders of pictures or CIFAR-10."""

    train: str | None = None  # folder of training images
    heldout: str | None = None  # folder of held-out images
    cifar10: str | None = None  # folder of CIFAR-10 (vistok.data.cifar10); its test images are held out
    heldout_images: int | None = None  # measure on the first so many held-out images; on all by default
    source_size: int = 128  # images are kept at this size and augmented before they are reduced
    mse: float = 1.0
    l1: float = 0.2
    perceptual: float = 0.0  # weight of the perceptual loss
    perceptual_images: int = 8  # of a batch: the perceptual network costs as much as the tokenizer
    tail_drop: float = 0.0  # share of images that lose their last tokens (One-D-Piece, FlexTok)
    freeze_encoder: bool = False  # train the decoder alone: every image keeps its tokens
    channels_last: bool = True  # memory layout of images and weights; model and device decide which is faster


class ReconstructionTask(Task):
    """What all tokenizers have in common: the images, and how far a reconstruction is from them.

    Raises:
        ValueError: `options` name no data, or both kinds, or ask a tokenizer of fixed length to drop tails.
    """

    def __init__(
        self,
        model: ImageTokenizer,
        options: TokenizerOptions,
        augmentation: Augmentation,
        device: torch.device,
    ) -> None:
        if options.tail_drop and not model.variable_length:
            raise ValueError(f"{type(model).__name__} has a fixed length: tail_drop must be 0")
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model: Any = model.to(memory_format=self.memory_format)
        self.options = options
        self.augmentation = augmentation
        self.device = device
        self.images, heldout = _load(options, model.image_size)
        self.heldout = heldout[: options.heldout_images]
        for part in self.encoding_parts():
            part.requires_grad_(not options.freeze_encoder)
        self.perceptual = PerceptualLoss().to(device) if options.perceptual else None

    def encoding_parts(self) -> tuple[nn.Module, ...]:
        """The parts of the model that decide which tokens an image has."""
        raise NotImplementedError(f"{type(self).__name__} does not define encoding_parts()")

    def draw_images(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Augmented training images `[b 3 H W]`."""
        chosen = torch.randint(len(self.images), (batch_size,), generator=generator)
        images = self.images[chosen].float() / 127.5 - 1
        images = augment(images, self.augmentation, self.model.image_size, generator)
        return images.to(self.device, memory_format=self.memory_format)

    def reconstruction_loss(
        self, reconstruction: Tensor, images: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Weighted squared, absolute and perceptual error; logs the PSNR."""
        reconstruction = reconstruction.float()
        mse = F.mse_loss(reconstruction, images)
        loss = self.options.mse * mse + self.options.l1 * F.l1_loss(reconstruction, images)
        logs: dict[str, float | Tensor] = {"psnr": psnr_from_mse(mse.detach())}
        if self.perceptual is not None:
            few = slice(self.options.perceptual_images)
            with torch.autocast(images.device.type, enabled=False):  # the network's weights are float32
                distance = self.perceptual(reconstruction[few], images[few])
            loss = loss + self.options.perceptual * distance
            logs["perceptual"] = distance.detach()
        return loss, logs

    def heldout_batches(self) -> Iterator[Tensor]:
        """Held-out images `[b 3 H W]`."""
        for images in self.heldout.split(64):
            yield (images.float() / 127.5 - 1).to(self.device)


class TokenizerTask(ReconstructionTask):
    """Reconstruction of augmented images; measured on the held-out ones without augmentation.

    The model has an `encoder` and a `quantizer`, and its `forward(images)`, of a variable-length tokenizer
    `forward(images, lengths)`, gives reconstructions and a `QuantizerOutput`.
    """

    def encoding_parts(self) -> tuple[nn.Module, ...]:
        return self.model.encoder, self.model.quantizer

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images `[b 3 H W]`, and how many of their tokens are kept `[b]`."""
        images = self.draw_images(batch_size, generator)
        lengths = draw_lengths(batch_size, self.model.num_tokens, self.options.tail_drop, generator)
        return images, lengths.to(self.device)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`reconstruction_loss` and the quantizer's own; logs the PSNR and the distinct codes of the batch."""
        images, lengths = batch
        arguments = (images, lengths) if self.model.variable_length else (images,)
        reconstruction, quantized = self.model(*arguments)
        loss, logs = self.reconstruction_loss(reconstruction, images)
        used = len(quantized.indices.unique()) / min(quantized.indices.numel(), self.model.codebook_size)
        return loss + quantized.loss, {**logs, "batch_codes_used": used}

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Held-out PSNR (mean over images, dB) and the share of the codebook that the held-out images use."""
        psnr, used = [], torch.zeros(model.codebook_size, dtype=torch.bool)
        for images in self.heldout_batches():
            tokens = model.encode(images)
            error = (model.decode(tokens) - images).square().mean(dim=(1, 2, 3))
            psnr.append(psnr_from_mse(error))
            used[tokens.data.flatten().cpu()] = True
        return {
            "heldout_psnr": torch.cat(psnr).mean().item(),
            "heldout_codebook_usage": used.float().mean().item(),
        }


def _load(options: TokenizerOptions, image_size: int) -> tuple[Tensor, Tensor]:
    """Training images uint8 `[n 3 s s]`, s as the options say, and held-out ones `[m 3 image_size image_size]`."""
    if options.cifar10 is not None and options.train is None and options.heldout is None:
        images, heldout = (load_cifar10(options.cifar10, split)[0] for split in ("train", "test"))
        if image_size != heldout.shape[-1]:
            raise ValueError(f"CIFAR-10 has 32x32 pixels, the tokenizer takes {image_size}")
        return images, heldout
    if options.cifar10 is None and options.train is not None and options.heldout is not None:
        train = load_folder(Path(options.train), options.source_size)
        return train, load_folder(Path(options.heldout), image_size)
    raise ValueError("name the data of a tokenizer training: either train and heldout, or cifar10")


def draw_lengths(batch_size: int, num_tokens: int, tail_drop: float, generator: torch.Generator) -> Tensor:
    """How many tokens each image keeps `[b]`: all, or, with probability `tail_drop`, log-uniformly many of them."""
    share = torch.rand(batch_size, generator=generator)
    lengths = (num_tokens**share).round().long()  # 1 .. num_tokens
    dropped = torch.rand(batch_size, generator=generator) < tail_drop
    return torch.where(dropped, lengths, num_tokens)


def psnr_from_mse(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error between images in [-1, 1]."""
    return 10 * torch.log10(4 / mse)
