"""Where the images of a measurement come from: a folder, or batches that a model draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.data.images import image_files, open_rgb, resize_and_crop
from vistok.eval.features import check_uint8

Source = Path | str | Iterable[Tensor] | Callable[[], Iterable[Tensor]]


def to_uint8(images: Tensor) -> Tensor:
    """Float `[b 3 H W]` in [-1, 1] -> uint8 on the CPU, rounded to the nearest of 256 values and clamped."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_float(images: Tensor) -> Tensor:
    """uint8 `[b 3 H W]` -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def pixels(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 `[3 H W]`."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def image_batches(source: Source, batch_size: int, image_size: int | None = None) -> Iterator[Tensor]:
    """uint8 batches `[b 3 H W]` of one size from any source.

    Args:
        source: a folder (all pictures under it), or uint8 batches, or a function that returns them.
        batch_size: images per batch read from a folder.
        image_size: resize and centre-crop the pictures of a folder to this; otherwise they stay as they are.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a folder without images, a damaged one, batches that are not uint8 `[b 3 H W]`, or images of
            different sizes.
    """
    if isinstance(source, (str, Path)):
        batches: Iterable[Tensor] = _folder_batches(Path(source), batch_size, image_size)
    else:
        batches = source() if callable(source) else source
    size: torch.Size | None = None
    for batch in batches:
        check_uint8(batch)
        size = size or batch.shape[2:]
        if batch.shape[2:] != size:
            raise ValueError(_sizes_differ(f"a batch of {source_name(source)}", batch.shape[2:], size))
        yield batch


def source_name(source: Source) -> str:
    """A folder's own name, or `"samples"`: results travel, and paths of one machine should not."""
    return Path(source).resolve().name if isinstance(source, (str, Path)) else "samples"


def source_length(source: Source) -> int | None:
    """Number of images under a folder, `None` for batches."""
    return len(image_files(source)) if isinstance(source, (str, Path)) else None


def _folder_batches(folder: Path, batch_size: int, image_size: int | None) -> Iterator[Tensor]:
    files = image_files(folder)
    size: tuple[int, int] | None = None
    for start in range(0, len(files), batch_size):
        pictures = []
        for path in files[start : start + batch_size]:
            picture = open_rgb(path)
            if image_size is not None:
                picture = resize_and_crop(picture, image_size)
            size = size or picture.size
            if picture.size != size:
                raise ValueError(_sizes_differ(str(path), picture.size[::-1], size[::-1]))
            pictures.append(pixels(picture))
        yield torch.stack(pictures)


def _sizes_differ(name: str, found: Iterable[int], expected: Iterable[int]) -> str:
    (height, width), (first_height, first_width) = found, expected
    return (
        f"{name} is {width}x{height} and the images before it {first_width}x{first_height}; "
        "give an image size, so that all are resized and cropped to it"
    )
