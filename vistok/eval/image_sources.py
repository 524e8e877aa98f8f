"""Pictures of a folder or of a parquet table, as the pixels that a measurement compares."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vistok.data.images import decode_rgb, image_files, open_rgb, resize_and_crop
from vistok.eval.sources import pixels

IMAGE_COLUMN = "image"  # of structs {bytes, path}, as Hugging Face's datasets stores pictures


def load_pictures(source: Path, *, image_size: int | None = None, num_images: int | None = None) -> Tensor:
    """Pictures of one size, uint8 `[n 3 H W]`.

    Args:
        source: a picture, a folder of pictures (all under it, sorted by path), or a `.parquet` file with a column
            `image` of `{bytes, path}`.
        image_size: shorter side to this and centre crop (bicubic); otherwise pictures stay as they are.
        num_images: take this many, evenly spread over the source; all by default.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: no pictures or fewer than `num_images`, a damaged one, another kind of table, or different sizes
            without `image_size`.
        ModuleNotFoundError: a parquet file without pyarrow.
    """
    pictures: list[Tensor] = []
    for name, picture in _read(source, num_images):
        if image_size is not None:
            picture = resize_and_crop(picture, image_size)
        pictures.append(pixels(picture))
        if pictures[-1].shape != pictures[0].shape:
            (_, height, width), (_, first_height, first_width) = pictures[-1].shape, pictures[0].shape
            raise ValueError(
                f"{name} is {width}x{height} and the images before it {first_width}x{first_height}; "
                "give an image size, so that all are resized and cropped to it"
            )
    return torch.stack(pictures)


def _read(source: Path, num_images: int | None) -> Iterator[tuple[str, Image.Image]]:
    if source.suffix.lower() == ".parquet":
        yield from _read_parquet(source, num_images)
        return
    files = image_files(source)
    for number in _chosen(source, len(files), num_images):
        yield str(files[number]), open_rgb(files[number])


def _read_parquet(source: Path, num_images: int | None) -> Iterator[tuple[str, Image.Image]]:
    column = _image_column(source)
    for number in _chosen(source, len(column), num_images):
        name, data = f"{source}, row {number}", (column[number].as_py() or {}).get("bytes")
        if not data:
            raise ValueError(f"{name} holds no picture (the bytes are missing)")
        yield name, decode_rgb(BytesIO(data), name)


def _image_column(source: Path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading {source.name} needs pyarrow; run `pip install 'vistok[eval]'`"
        ) from None
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist")
    try:
        schema = parquet.read_schema(source)
        column_type = schema.field(IMAGE_COLUMN).type if IMAGE_COLUMN in schema.names else pyarrow.null()
        if not (pyarrow.types.is_struct(column_type) and column_type.get_field_index("bytes") >= 0):
            raise ValueError(
                f"{source} needs a column {IMAGE_COLUMN!r} of structs with `bytes`; it has {', '.join(schema.names)}"
            )
        return parquet.read_table(source, columns=[IMAGE_COLUMN]).column(IMAGE_COLUMN)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source} is not a complete parquet file: {error}") from None


def _chosen(source: Path, available: int, num_images: int | None) -> list[int]:
    """Evenly spread positions: neighbours in a data set tend to be alike."""
    if not available:
        raise ValueError(f"{source} holds no images")
    if num_images is None:
        return list(range(available))
    if not 1 <= num_images <= available:
        raise ValueError(
            f"num_images must be in 1..{available}, which is what {source} holds; got {num_images}"
        )
    return [position * available // num_images for position in range(num_images)]
