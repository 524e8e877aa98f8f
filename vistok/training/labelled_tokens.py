"""CIFAR-10 as tokens with class labels: tokenized once, kept in a file beside the runs that train on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vistok.data.cifar10 import Split, load_cifar10
from vistok.files import atomic_path
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.kl import KLTokenizer

BATCH_SIZE = 64


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens of the images of one split: code indices, or posteriors, means before standard deviations."""

    plain: Tensor  # [n t] int64, or [n t 2c] float16
    flipped: Tensor  # likewise, of the images mirrored left to right
    labels: Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.labels)


def load_or_tokenize(
    tokenizer: ImageTokenizer, cifar10: Path | str, folder: Path
) -> tuple[LabelledTokens, LabelledTokens]:
    """Training and test images of CIFAR-10 as tokens, from `folder` if they were written there before.

    A file of other images is replaced.

    Args:
        tokenizer: for 32 x 32 pixels, on the device where it should run.
        cifar10: see `load_cifar10`.
        folder: holds a file per tokenizer; made if it does not exist.

    Raises:
        FileNotFoundError: the images are not in `cifar10`.
        ValueError: the tokenizer is continuous without a posterior, or takes images of another size.
    """
    origin = {"tokenizer": tokenizer.identity(), "images": str(cifar10)}
    path = folder / f"tokens-{tokenizer.identity()}.safetensors"
    tensors = _read(path, origin)
    if tensors is None:
        tensors = {}
        for split in ("train", "test"):
            for name, tensor in _tokenize(tokenizer, cifar10, split).items():
                tensors[f"{split}.{name}"] = tensor
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file(tensors, partial, origin)
    return _split(tensors, "train"), _split(tensors, "test")


def _split(tensors: dict[str, Tensor], split: Split) -> LabelledTokens:
    plain, flipped, labels = (tensors[f"{split}.{name}"] for name in ("plain", "flipped", "labels"))
    if not plain.is_floating_point():
        plain, flipped = plain.long(), flipped.long()
    return LabelledTokens(plain, flipped, labels.long())


def _read(path: Path, origin: dict[str, str]) -> dict[str, Tensor] | None:
    """What was written for the same `origin`, or nothing."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != origin:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError:
        return None


@torch.inference_mode()
def _tokenize(tokenizer: ImageTokenizer, cifar10: Path | str, split: Split) -> dict[str, Tensor]:
    images, labels = load_cifar10(cifar10, split)
    if tokenizer.image_size != images.shape[-1]:
        raise ValueError(f"CIFAR-10 has 32x32 pixels, the tokenizer takes {tokenizer.image_size}")
    found: dict[str, list[Tensor]] = {"plain": [], "flipped": []}
    for batch in tqdm(images.split(BATCH_SIZE), desc=f"tokenizing {split}", unit="batch"):
        pixels = (batch.float() / 127.5 - 1).to(tokenizer.device)
        for name, seen in (("plain", pixels), ("flipped", pixels.flip(-1))):
            found[name].append(_tokens(tokenizer, seen).cpu())
    return {**{name: torch.cat(parts) for name, parts in found.items()}, "labels": labels.int()}


def _tokens(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Indices `[b t]` int32, or posteriors `[b t 2c]` float16."""
    if tokenizer.codebook_size is not None:
        return tokenizer.encode(images).data.int()
    if not isinstance(tokenizer, KLTokenizer):
        raise ValueError(f"{type(tokenizer).__name__} is continuous and has no posterior on a grid to learn")
    posterior = tokenizer.posterior(images)
    return torch.cat([posterior.mean, posterior.std], dim=-1).flatten(1, 2).half()
