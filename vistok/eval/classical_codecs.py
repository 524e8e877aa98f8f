"""JPEG, WebP and AVIF as Pillow writes them: what learned tokenizers are measured against."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import PIL
from PIL import Image, features


@dataclass(frozen=True)
class ClassicalCodec:
    """A file format with a quality dial.

    Args:
        name: what the user calls it.
        library: what Pillow calls the library behind it.
        qualities: a sweep from small to large files.
        options: of Pillow's `save`, for small files.
    """

    name: str
    library: str
    qualities: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def compress(self, picture: Image.Image, quality: int) -> bytes:
        """The whole file, headers included."""
        file = BytesIO()
        picture.save(file, format=self.name.upper(), quality=quality, **self.options)
        return file.getvalue()

    def decompress(self, data: bytes) -> Image.Image:
        """The RGB picture of a file."""
        with Image.open(BytesIO(data), formats=[self.name.upper()]) as picture:
            return picture.convert("RGB")

    def describe(self) -> str:
        """Format, options and versions, in words for a result's protocol."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        version = features.version(self.library)
        return f"{self.name} by Pillow {PIL.__version__} ({self.library} {version}{options})"


QUALITIES = (1, 5, 10, 20, 40, 60, 80, 95)
CODECS = {
    codec.name: codec
    for codec in (
        # Not progressive: at a few hundred pixels per side the headers of its scans cost more than they save.
        ClassicalCodec("jpeg", "libjpeg_turbo", QUALITIES, {"optimize": True}),
        ClassicalCodec("webp", "webp", QUALITIES, {"method": 6}),
        ClassicalCodec("avif", "avif", QUALITIES, {"speed": 6}),
    )
}


def is_available(name: str) -> bool:
    """Whether this Pillow was built to write the format."""
    Image.init()
    return name.upper() in Image.SAVE


def load_codec(name: str) -> ClassicalCodec:
    """The codec called `name`, one of CODECS.

    Raises:
        ValueError: another name, or this Pillow was built without it.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; choose from {', '.join(CODECS)}")
    if not is_available(name):
        raise ValueError(
            f"this Pillow ({PIL.__version__}) was built without {name.upper()}; "
            f"choose from {', '.join(filter(is_available, CODECS))}"
        )
    return CODECS[name]
