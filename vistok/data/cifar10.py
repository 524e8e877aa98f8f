"""CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes.

`load_cifar10(folder, "train")` reads parquet tables if `folder` holds some, such as Hugging Face's `uoft-cs/cifar10`
or any other with the columns `image` or `img` (of `{bytes, path}`) and `label`; otherwise torchvision's files, which it
downloads on request.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vistok.data.images import decode_rgb

IMAGE_SIZE = 32
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

Split = Literal["train", "test"]


def load_cifar10(
    folder: Path | str, split: Split = "train", *, download: bool = False
) -> tuple[Tensor, Tensor]:
    """All images of a split, uint8 `[n 3 32 32]`, and their labels, int64 `[n]`, indices into `CLASS_NAMES`.

    Args:
        folder: with files `*train*.parquet` and `*test*.parquet`, or the `root` of `torchvision.datasets.CIFAR10`.
        split: "train" or "test".
        download: let torchvision fetch the data (170 MB) into `folder` if it is not there.

    Raises:
        FileNotFoundError: the data is not in `folder`.
        ValueError: another split, or a table that is not CIFAR-10.
        ModuleNotFoundError: parquet tables without pyarrow.
    """
    if split not in ("train", "test"):
        raise ValueError(f"CIFAR-10 has the splits train and test, not {split!r}")
    tables = sorted(Path(folder).glob(f"*{split}*.parquet"))
    images, labels = _read_tables(tables) if tables else _read_torchvision(Path(folder), split, download)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(CLASS_NAMES):
        raise ValueError(
            f"{folder} has labels {int(labels.min())} to {int(labels.max())}; CIFAR-10 has 0 to 9"
        )
    return images, labels


def _read_tables(files: list[Path]) -> tuple[Tensor, Tensor]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading {files[0].name} needs pyarrow; run `pip install 'vistok[eval]'`"
        ) from None
    images: list[Tensor] = []
    labels: list[int] = []
    for file in files:
        try:
            table = parquet.read_table(file)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is not a complete parquet file: {error}") from None
        columns = set(table.column_names)
        if "label" not in columns or not (image := columns & {"image", "img"}):
            raise ValueError(
                f"{file} needs the columns image and label; it has {', '.join(table.column_names)}"
            )
        rows = table.column(image.pop())
        images += [
            _decode((row.as_py() or {}).get("bytes"), f"{file}, row {i}") for i, row in enumerate(rows)
        ]
        labels += table.column("label").to_pylist()
    return torch.stack(images), torch.tensor(labels)


def _decode(data: bytes | None, name: str) -> Tensor:
    if not data:
        raise ValueError(f"{name} holds no picture (the bytes are missing)")
    picture = decode_rgb(BytesIO(data), name)
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"{name} is {picture.width}x{picture.height}; CIFAR-10 has 32x32 pixels")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _read_torchvision(folder: Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10  # slow to import

    try:
        dataset = CIFAR10(str(folder), train=split == "train", download=download)
    except RuntimeError:
        raise FileNotFoundError(
            f"{folder} holds no CIFAR-10: neither *{split}*.parquet nor cifar-10-batches-py; "
            f"`python -m vistok.data.cifar10 {folder}` downloads it"
        ) from None
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def main() -> None:
    """Command line of the download."""
    parser = argparse.ArgumentParser(description="Download CIFAR-10 with torchvision.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for split in ("train", "test"):
        load_cifar10(folder, split, download=True)


if __name__ == "__main__":
    main()
