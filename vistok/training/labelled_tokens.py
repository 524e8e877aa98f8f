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

FILE_NAME = "tokens.safetensors"
BATCH_SIZE = 64


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens of the images of one split."""

    plain: Tensor  # [n t] int64
    flipped: Tensor  # [n t] int64, of the images mirrored left to right
    labels: Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.labels)


def load_or_tokenize(
    tokenizer: ImageTokenizer, cifar10: Path | str, folder: Path
) -> tuple[LabelledTokens, LabelledTokens]:
    """Training and test images of CIFAR-10 as tokens, from `folder` if they were written there before.

    A file of another tokenizer or of other images is replaced.

    Args:
        tokenizer: a discrete tokenizer for 32 x 32 pixels, on the device where it should run.
        cifar10: see `load_cifar10`.
        folder: holds `tokens.safetensors`; made if it does not exist.

    Raises:
        FileNotFoundError: the images are not in `cifar10`.
        ValueError: the tokenizer is continuous or takes images of another size.
    """
    origin = {"tokenizer": tokenizer.identity(), "images": str(cifar10)}
    path = folder / FILE_NAME
    tensors = _read(path, origin)
    if tensors is None:
        tensors = {}
        for split in ("train", "test"):
            for name, tensor in _tokenize(tokenizer, cifar10, split).items():
                tensors[f"{split}.{name}"] = tensor
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file(tensors, partial, origin)
    train, test = (
        LabelledTokens(*(tensors[f"{split}.{name}"].long() for name in ("plain", "flipped", "labels")))
        for split in ("train", "test")
    )
    return train, test


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
    if tokenizer.codebook_size is None:
        raise ValueError(f"{type(tokenizer).__name__} is continuous; a class generator learns code indices")
    if tokenizer.image_size != images.shape[-1]:
        raise ValueError(f"CIFAR-10 has 32x32 pixels, the tokenizer takes {tokenizer.image_size}")
    found: dict[str, list[Tensor]] = {"plain": [], "flipped": []}
    for batch in tqdm(images.split(BATCH_SIZE), desc=f"tokenizing {split}", unit="batch"):
        pixels = (batch.float() / 127.5 - 1).to(tokenizer.device)
        for name, seen in (("plain", pixels), ("flipped", pixels.flip(-1))):
            found[name].append(tokenizer.encode(seen).data.int().cpu())
    return {**{name: torch.cat(parts) for name, parts in found.items()}, "labels": labels.int()}
