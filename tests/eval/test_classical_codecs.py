"""JPEG, WebP and AVIF through Pillow."""

from __future__ import annotations

from io import BytesIO

import pytest
from PIL import Image

from vistok.eval.classical_codecs import CODECS, is_available, load_codec
from vistok.eval.reconstruction import psnr
from vistok.eval.sources import pixels


@pytest.fixture
def picture() -> Image.Image:
    gradient = Image.radial_gradient("L").resize((48, 32))
    return Image.merge(
        "RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_180), gradient.point(lambda v: 255 - v))
    )


@pytest.mark.parametrize("name", [name for name in CODECS if is_available(name)])
def test_more_bytes_give_a_better_picture(name: str, picture: Image.Image):
    codec = load_codec(name)
    files = [codec.compress(picture, quality) for quality in (5, 50, 95)]
    assert len(files[0]) < len(files[1]) < len(files[2])
    decoded = [codec.decompress(file) for file in files]
    quality = [psnr(pixels(image)[None], pixels(picture)[None]).item() for image in decoded]
    assert quality[0] < quality[1] < quality[2] and quality[2] > 30
    assert Image.open(BytesIO(files[0])).format == name.upper()
    assert name in codec.describe() and "Pillow" in codec.describe()


def test_unknown_and_missing_codecs(monkeypatch):
    with pytest.raises(ValueError, match="unknown codec 'jpegxl'; choose from jpeg, webp, avif"):
        load_codec("jpegxl")
    monkeypatch.setattr(Image, "SAVE", {"JPEG": None, "WEBP": None})
    with pytest.raises(ValueError, match="was built without AVIF; choose from jpeg, webp"):
        load_codec("avif")
