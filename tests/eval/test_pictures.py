"""Grids and strips: sizes, margins, labels that fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from vistok.eval.pictures import (
    FONT_SIZE,
    LABEL_GAP,
    LINE_HEIGHT,
    MARGIN,
    PAIR_GAP,
    grid,
    reconstruction_strip,
    wrap,
)

FONT = ImageFont.load_default(size=FONT_SIZE)


def tiles(count: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, (200, 30, 30)) for _ in range(count)]


def test_grid_size_and_places():
    picture = grid(tiles(5), ["apple"] * 5, columns=3)
    row = 128 + LABEL_GAP + LINE_HEIGHT + MARGIN
    assert picture.size == (MARGIN + 3 * (128 + MARGIN), MARGIN + 2 * row)
    assert picture.getpixel((MARGIN, MARGIN)) == (200, 30, 30)
    assert picture.getpixel((MARGIN + 127, MARGIN + row + 127)) == (200, 30, 30)
    empty = picture.crop((MARGIN + 2 * (128 + MARGIN), MARGIN + row, *picture.size))
    assert empty.getextrema() == ((255, 255),) * 3  # the sixth place


def test_labels_are_drawn_inside_their_tile():
    plain, labelled = (np.asarray(grid(tiles(2), labels, columns=2)) for labels in (["", "a"], ["gjy", "a"]))
    assert labelled.shape == plain.shape
    below = slice(MARGIN + 128 + LABEL_GAP, MARGIN + 128 + LABEL_GAP + LINE_HEIGHT)
    changed = np.argwhere((labelled != plain).any(axis=2))
    assert len(changed) and (changed[:, 0] >= below.start).all() and (changed[:, 0] < below.stop + 2).all()
    assert (changed[:, 1] >= MARGIN).all() and (changed[:, 1] < MARGIN + 128).all()


def test_unlabelled_grid_has_no_room_for_labels():
    assert grid(tiles(2), columns=8).size == (MARGIN + 2 * (128 + MARGIN), 2 * MARGIN + 128)


def test_large_and_oblong_pictures_keep_their_size_and_shape():
    picture = grid(tiles(1, (300, 100)), columns=1)
    assert picture.size == (300 + 2 * MARGIN, 300 + 2 * MARGIN)
    assert picture.getpixel((MARGIN, MARGIN)) == (255, 255, 255)
    assert picture.getpixel((MARGIN, MARGIN + 150)) == (200, 30, 30)


@pytest.mark.parametrize(
    "label", ["apple", "man with white cane facing right", "x" * 80, "a very long label " * 9, "two\nlines"]
)
def test_wrapped_lines_fit(label):
    lines = wrap(label, 128, FONT)
    assert 1 <= len(lines) <= 2 and all(FONT.getlength(line) <= 128 for line in lines)
    shortened = lines[-1].endswith("…")
    assert shortened == (len(label) > 40)
    if not shortened:
        assert " ".join(lines).split() == label.split()


def test_strip_pairs_and_psnr():
    originals, reconstructions = tiles(3), [Image.new("RGB", (64, 64), (210, 40, 40))] * 3
    strip = reconstruction_strip(originals, reconstructions, ["one", "two", "three"], columns=2)
    width = 2 * 128 + PAIR_GAP
    row = 128 + LABEL_GAP + 2 * LINE_HEIGHT + MARGIN
    assert strip.size == (MARGIN + 2 * (width + MARGIN), MARGIN + 2 * row)
    assert strip.getpixel((MARGIN + 64, MARGIN + 64)) == (200, 30, 30)
    assert strip.getpixel((MARGIN + 128 + PAIR_GAP + 64, MARGIN + 64)) == (210, 40, 40)
    better = [Image.new("RGB", (64, 64), (201, 31, 31))] * 3
    texts = [
        np.asarray(reconstruction_strip(originals, made))[MARGIN + 128 :]
        for made in (reconstructions, better)
    ]
    assert (texts[0] != texts[1]).any()  # 28.1 dB and 48.1 dB


def test_a_long_label_leaves_the_psnr_readable():
    label = "raised hand with part between middle and ring fingers and more"
    texts = [
        np.asarray(reconstruction_strip(tiles(1), [Image.new("RGB", (64, 64), colour)], [label]))[
            MARGIN + 128 :
        ]
        for colour in ((210, 40, 40), (201, 31, 31))
    ]
    assert (texts[0] != texts[1]).any()


def test_errors():
    with pytest.raises(ValueError, match="2 labels for 3 pictures"):
        grid(tiles(3), ["a", "b"])
    with pytest.raises(ValueError, match="no pictures"):
        grid([])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        grid(tiles(1), columns=0)
    with pytest.raises(ValueError, match="equally many"):
        reconstruction_strip(tiles(2), tiles(1))
    with pytest.raises(ValueError, match="differ in shape"):
        reconstruction_strip(tiles(1), tiles(1, (32, 32)))
