from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.images import (
    image_files,
    load_folder,
    load_image,
    open_rgb,
    resize_and_crop,
    to_pil,
    to_tensor,
)


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple:
    picture = open_rgb(path)
    assert picture.mode == "RGB"
    return picture.getpixel((x, y))


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.putpixel((2, 0), (0, 0, 0, 128))
    picture.save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (255, 0, 0)
    assert pixel(tmp_path / "a.png", 1) == (255, 255, 255)
    assert pixel(tmp_path / "a.png", 2) == (127, 127, 127)


def test_transparent_palette_and_grey_alpha(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixel(tmp_path / "p.png") == (255, 255, 255) and pixel(tmp_path / "p.png", 1) == (200, 100, 50)
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    assert pixel(tmp_path / "la.png") == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32768, 128), (65535, 255)])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, value: int, expected: int) -> None:
    values = np.array([[value, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (expected,) * 3
    assert pixel(tmp_path / "a.png", 1) == (255,) * 3


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (1, 1, 1)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert pixel(tmp_path / "a.tif") == (255, 0, 0)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == (255, 0, 0)


def test_the_rotation_of_a_camera_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), "white")
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture.save(tmp_path / "a.png", exif=exif)
    assert open_rgb(tmp_path / "a.png").size == (2, 4)


def test_what_is_no_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png is not an image"):
        open_rgb(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png does not exist"):
        open_rgb(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_a_truncated_image_is_an_error(tmp_path: Path, suffix: str) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    noise.save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"half.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"half\.{suffix} is (damaged or truncated|not an image)"):
        open_rgb(tmp_path / f"half.{suffix}")


def test_resize_and_crop_keeps_the_middle() -> None:
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste("blue", (10, 0, 20, 10))
    assert resize_and_crop(picture, 10).getcolors() == [(100, (0, 0, 255))]
    assert resize_and_crop(picture, 4, smallest=10).size == (4, 4)
    with pytest.raises(ValueError, match="30x10, smaller than one 11-pixel patch"):
        resize_and_crop(picture, 4, smallest=11)


def test_tensors_and_pictures_are_inverse() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(to_pil(tensor[None])[0]), np.asarray(picture))
    assert to_pil(torch.full((1, 3, 1, 1), 7.0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_load_image_names_the_file_in_its_errors(tmp_path: Path) -> None:
    Image.new("RGB", (5, 9)).save(tmp_path / "small.png")
    assert load_image(tmp_path / "small.png", 8).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"small\.png: .*5x9"):
        load_image(tmp_path / "small.png", 8, smallest=8)


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        image_files(tmp_path)
    (tmp_path / "sub").mkdir()
    for name, colour in (("b.PNG", "red"), ("a.jpg", "lime"), ("sub/c.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.png"]
    images = load_folder(tmp_path, 4)
    assert images.shape == (3, 3, 4, 4) and images.dtype == torch.uint8
    assert images[1, :, 0, 0].tolist() == [255, 0, 0] and images[2, :, 0, 0].tolist() == [0, 0, 255]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        image_files(tmp_path / "nowhere")
