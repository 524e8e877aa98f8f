"""CIFAR-10 from parquet tables and from torchvision's files."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.cifar10 import CLASS_NAMES, load_cifar10

pyarrow = pytest.importorskip("pyarrow")


def pixels(count: int) -> np.ndarray:
    """Random pictures uint8 `[n 32 32 3]`."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def png(picture: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def write_table(
    path: Path, pictures: list[bytes | None], labels: list[int], *, column: str = "image"
) -> None:
    from pyarrow import parquet

    rows = [{"bytes": data, "path": None} for data in pictures]
    parquet.write_table(pyarrow.table({column: rows, "label": labels}), path)


@pytest.mark.parametrize("column", ["image", "img"])  # ours and Hugging Face's
def test_tables_of_a_split_are_joined_in_order(tmp_path, column):
    pictures = pixels(3)
    write_table(tmp_path / "train-00001.parquet", [png(pictures[2])], [9], column=column)
    write_table(tmp_path / "train-00000.parquet", [png(p) for p in pictures[:2]], [3, 0], column=column)
    write_table(tmp_path / "x-test.parquet", [png(pictures[0])], [5], column=column)
    images, labels = load_cifar10(tmp_path, "train")
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pictures) and labels.tolist() == [3, 0, 9]
    assert load_cifar10(tmp_path, "test")[1].tolist() == [5]


def test_torchvisions_files_are_read(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pictures = pixels(2)
    planes = pictures.transpose(0, 3, 1, 2).reshape(2, -1)  # the published layout: red, green, blue plane
    (folder / "test_batch").write_bytes(pickle.dumps({"data": planes, "labels": [1, 8]}))
    images, labels = load_cifar10(tmp_path, "test")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pictures) and labels.tolist() == [1, 8]


def test_there_are_ten_classes():
    assert len(set(CLASS_NAMES)) == 10 and CLASS_NAMES[3] == "cat"


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="neither .*train.*parquet nor cifar-10-batches-py; .* downloads it"
    ):
        load_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("pictures", "labels", "column", "message"),
    [
        ([png(pixels(1)[0])], [10], "image", "labels 10 to 10; CIFAR-10 has 0 to 9"),
        ([png(np.zeros((8, 9, 3), np.uint8))], [1], "image", "row 0 is 9x8"),
        ([None], [1], "image", "row 0 holds no picture"),
        ([b"nothing"], [1], "image", "row 0 is not an image"),
        ([png(pixels(1)[0])], [1], "picture", "needs the columns image and label; it has picture, label"),
    ],
)
def test_other_tables_are_refused(tmp_path, pictures, labels, column, message):
    write_table(tmp_path / "train.parquet", pictures, labels, column=column)
    with pytest.raises(ValueError, match=message):
        load_cifar10(tmp_path)


def test_a_damaged_table_and_an_unknown_split_are_refused(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="not a complete parquet file"):
        load_cifar10(tmp_path)
    with pytest.raises(ValueError, match="train and test, not 'val'"):
        load_cifar10(tmp_path, "val")  # type: ignore[arg-type]
