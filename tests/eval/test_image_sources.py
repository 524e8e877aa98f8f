"""Pictures of folders and parquet tables."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from vistok.eval.image_sources import load_pictures


def png(colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def write_table(path: Path, rows: list[bytes | None], column: str = "image") -> Path:
    images = [{"bytes": row, "path": None} for row in rows]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(pyarrow.table({column: pyarrow.array(images, type=kind)}), path)
    return path


COLOURS = [(20 * number, 100, 255 - 20 * number) for number in range(7)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "images.parquet", [png(colour) for colour in COLOURS])


def test_a_table_and_a_folder_give_the_same_pixels(table: Path, folder_of):
    folder = folder_of("pictures", COLOURS, size=(20, 16))
    images = load_pictures(table)
    assert images.shape == (7, 3, 16, 20) and images.dtype == torch.uint8
    assert images[:, :, 0, 0].tolist() == [list(colour) for colour in COLOURS]
    assert torch.equal(images, load_pictures(folder))
    assert load_pictures(table, image_size=8).shape == (7, 3, 8, 8)


@pytest.mark.parametrize("source", ["table", "folder"])
def test_few_images_are_spread_over_the_source(source: str, table: Path, folder_of):
    path = table if source == "table" else folder_of("pictures", COLOURS)
    chosen = load_pictures(path, num_images=3)[:, 0, 0, 0].tolist()
    assert chosen == [COLOURS[number][0] for number in (0, 2, 4)]
    with pytest.raises(ValueError, match=r"num_images must be in 1\.\.7, which is what .* holds; got 8"):
        load_pictures(path, num_images=8)


def test_bad_tables(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet does not exist"):
        load_pictures(tmp_path / "nowhere.parquet")
    with pytest.raises(ValueError, match="needs a column 'image' of structs with `bytes`; it has picture"):
        load_pictures(write_table(tmp_path / "other.parquet", [png((0, 0, 0))], column="picture"))
    parquet.write_table(pyarrow.table({"image": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="needs a column 'image' of structs"):
        load_pictures(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="holds no images"):
        load_pictures(write_table(tmp_path / "empty.parquet", []))
    (tmp_path / "text.parquet").write_text("not a table")
    with pytest.raises(ValueError, match="is not a complete parquet file"):
        load_pictures(tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, r"row 1 holds no picture"),
        (b"text", r"row 1 is not an image"),
        (png((1, 2, 3))[:50], r"row 1 is damaged"),
        (png((1, 2, 3), size=(16, 20)), r"row 1 is 16x20 and the images before it 20x16; give an image size"),
    ],
    ids=["missing", "text", "truncated", "another size"],
)
def test_bad_rows(tmp_path: Path, row: bytes | None, message: str):
    table = write_table(tmp_path / "images.parquet", [png((0, 0, 0)), row])
    with pytest.raises(ValueError, match=message):
        load_pictures(table)
