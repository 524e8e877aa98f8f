"""Reading pictures: any file that Pillow opens becomes RGB in [-1, 1], or a clear error."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"}


def open_rgb(path: Path) -> Image.Image:
    """Any picture as 8-bit RGB: first frame of an animation, EXIF rotation applied, alpha composited on white.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, or a truncated one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    return decode_rgb(path, str(path))


def decode_rgb(source: Path | BytesIO, name: str) -> Image.Image:
    """As `open_rgb`, also of a file's contents in memory; errors call it `name`."""
    try:
        with Image.open(source) as picture:
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is damaged or truncated: {error}") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):  # 16-bit or wider greyscale
        values = np.asarray(picture, dtype=np.float32)
        is_wide = picture.mode.startswith("I;16") or values.max(initial=0) > 255
        scale = 255 / 65535 if is_wide else 1.0
        picture = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")


def resize_and_crop(picture: Image.Image, image_size: int, *, smallest: int = 1) -> Image.Image:
    """Shorter side to `image_size` (bicubic, antialiased), then the centre crop.

    Raises:
        ValueError: a side of the picture is under `smallest` pixels.
    """
    if min(picture.size) < smallest:
        width, height = picture.size
        raise ValueError(
            f"the image is {width}x{height}, smaller than one {smallest}-pixel patch; use a larger one"
        )
    return ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 `[3 H W]` in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float `[b 3 H W]` in [-1, 1] -> RGB pictures, rounded to the nearest of 256 values."""
    values = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in values]


def load_image(path: Path | str, image_size: int, *, smallest: int = 1) -> Tensor:
    """A picture file as float32 `[3 image_size image_size]` in [-1, 1]; see `open_rgb` and `resize_and_crop`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, truncated, or with a side under `smallest` pixels; the message names the file.
    """
    picture = open_rgb(Path(path))
    try:
        return to_tensor(resize_and_crop(picture, image_size, smallest=smallest))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def image_files(source: Path | str) -> list[Path]:
    """The picture itself, or all pictures under a folder, sorted by path.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: a folder without pictures.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist")
    files = sorted(
        path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not files:
        raise ValueError(f"{source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def load_folder(source: Path | str, image_size: int) -> Tensor:
    """All pictures under a folder as uint8 `[n 3 image_size image_size]`, in the order of `image_files`."""
    return load_files(image_files(source), image_size)


def load_files(files: Sequence[Path], image_size: int) -> Tensor:
    """Picture files, resized and centre-cropped, as uint8 `[n 3 image_size image_size]`."""
    pictures = [resize_and_crop(open_rgb(path), image_size) for path in files]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
