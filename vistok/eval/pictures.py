"""Pictures of results: labelled grids, and originals beside their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vistok.eval.reconstruction import psnr
from vistok.eval.sources import pixels

TILE_SIZE = 128  # smaller pictures are scaled up to it, larger ones stay as they are
MARGIN = 16  # around the whole picture and between tiles
PAIR_GAP = 4
LABEL_GAP = 6
LABEL_LINES = 2
FONT_SIZE = 14
LINE_HEIGHT = 18
INK = (50, 50, 50)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int = 6) -> Image.Image:
    """Pictures in rows on white, each with its label beneath.

    Args:
        images: pictures; scaled to tiles of at least TILE_SIZE pixels with a Lanczos filter.
        labels: one for each picture; long ones are wrapped, then shortened.
        columns: pictures per row.

    Raises:
        ValueError: no pictures, another number of labels, or `columns` under 1.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures; give one for each, or none")
    _check_layout(images, columns)
    tile_size = max(TILE_SIZE, *(max(image.size) for image in images))
    return _rows([_scaled(image, tile_size) for image in images], labels, columns)


def reconstruction_strip(
    originals: Sequence[Image.Image],
    reconstructions: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    columns: int = 4,
) -> Image.Image:
    """Pairs of an original (left) and its reconstruction (right), with the label and the PSNR beneath.

    Args:
        originals: pictures.
        reconstructions: one of the same size for each.
        labels: one for each pair.
        columns: pairs per row; fewer if there are fewer.

    Raises:
        ValueError: no pictures, or the numbers or sizes of originals, reconstructions and labels differ.
    """
    if len(originals) != len(reconstructions) or (labels is not None and len(labels) != len(originals)):
        raise ValueError("originals, reconstructions and labels must be equally many")
    _check_layout(originals, columns)
    tile_size = max(TILE_SIZE, *(max(image.size) for image in originals))
    font = ImageFont.load_default(size=FONT_SIZE)
    pairs, captions = [], []
    for index, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True)):
        pair = _beside(_scaled(original, tile_size), _scaled(reconstruction, tile_size))
        label = (
            [] if labels is None else [_shortened(labels[index], pair.width, font)]
        )  # leaves a line for the PSNR
        value = psnr(_batch(reconstruction), _batch(original)).item()
        captions.append("\n".join([*label, f"{value:.1f} dB"]))
        pairs.append(pair)
    return _rows(pairs, captions, columns)


def _check_layout(images: Sequence[Image.Image], columns: int) -> None:
    if not images:
        raise ValueError("there are no pictures to lay out")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")


def _scaled(image: Image.Image, tile_size: int) -> Image.Image:
    """`image` fitted into a square of `tile_size`, centred on white."""
    scale = tile_size / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tile = Image.new("RGB", (tile_size, tile_size), "white")
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    tile.paste(picture, ((tile_size - size[0]) // 2, (tile_size - size[1]) // 2))
    return tile


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    pair = Image.new("RGB", (left.width + PAIR_GAP + right.width, left.height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + PAIR_GAP, 0))
    return pair


def _rows(tiles: list[Image.Image], labels: Sequence[str] | None, columns: int) -> Image.Image:
    """Equally large tiles in rows; all rows leave room for the longest label."""
    font = ImageFont.load_default(size=FONT_SIZE)
    width, height = tiles[0].size
    texts = [wrap(label, width, font) for label in labels] if labels is not None else []
    lines = max((len(text) for text in texts), default=0)
    label_height = LABEL_GAP + lines * LINE_HEIGHT if lines else 0
    columns = min(columns, len(tiles))
    rows = ceil(len(tiles) / columns)
    canvas = Image.new(
        "RGB",
        (MARGIN + columns * (width + MARGIN), MARGIN + rows * (height + label_height + MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for index, tile in enumerate(tiles):
        left = MARGIN + (index % columns) * (width + MARGIN)
        top = MARGIN + (index // columns) * (height + label_height + MARGIN)
        canvas.paste(tile, (left, top))
        for number, line in enumerate(texts[index] if texts else []):
            middle = left + (width - font.getlength(line)) / 2
            draw.text((middle, top + height + LABEL_GAP + number * LINE_HEIGHT), line, fill=INK, font=font)
    return canvas


def wrap(label: str, width: float, font: Font) -> list[str]:
    """`label` in at most LABEL_LINES lines that fit into `width` pixels; what is left over becomes an ellipsis."""
    lines: list[str] = []
    for paragraph in label.splitlines():
        words = paragraph.split()
        while words:
            count = len(words)
            while count > 1 and font.getlength(" ".join(words[:count])) > width:
                count -= 1
            lines.append(" ".join(words[:count]))
            words = words[count:]
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], " ".join(lines[LABEL_LINES - 1 :])]
    return [_shortened(line, width, font) for line in lines]


def _shortened(line: str, width: float, font: Font) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _batch(image: Image.Image) -> Tensor:
    return pixels(image.convert("RGB"))[None]  # [1 3 H W] uint8
