"""Neighbour tables: the nearest codes by brute force, and the files that keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vistok import KLTokenizer
from vistok.decoding.speculative import neighbours
from vistok.decoding.speculative.neighbours import NeighbourTable, codebook_hash


def random_codes(size: int = 50, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_neighbours", [0, 1, 7, 49])
def test_neighbours_are_the_nearest_other_codes(num_neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", 600)  # chunks of 12 codes, which do not divide 50
    codes = random_codes()
    distances = (codes.double()[:, None] - codes.double()).norm(dim=2).fill_diagonal_(torch.inf)
    table = NeighbourTable.build(codes, num_neighbours)
    assert torch.equal(table.indices.long(), distances.argsort(dim=1)[:, :num_neighbours])
    assert (table.codebook_size, table.num_neighbours) == (50, num_neighbours)


def test_equal_distances_come_by_rising_index() -> None:
    """Also where codes are the same; a code is never its own neighbour."""
    codes = torch.tensor([[0.0], [1.0], [1.0], [-1.0], [0.0]])
    table = NeighbourTable.build(codes, 4)
    assert table.indices.tolist() == [[4, 1, 2, 3], [2, 0, 4, 3], [1, 0, 4, 3], [0, 4, 1, 2], [0, 1, 2, 3]]


def test_near_codes_far_from_the_origin_are_told_apart() -> None:
    """As by the product of matrices they are not."""
    codes = 1000 + torch.tensor([[0.0], [0.2], [0.5], [0.9]])
    assert NeighbourTable.build(codes, 3).indices.tolist() == [[1, 2, 3], [0, 2, 3], [1, 3, 0], [2, 1, 0]]


def test_nearest_looks_up_rows() -> None:
    table = NeighbourTable.build(random_codes(), 5)
    found = table.nearest(torch.tensor([7, 0, 7]), 3)
    assert found.dtype == torch.int64
    assert torch.equal(found, table.indices[[7, 0, 7], :3].long())
    assert table.nearest(torch.tensor([7, 0]), 0).shape == (2, 0)
    assert torch.equal(table.to("cpu").indices, table.indices)


def test_a_table_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path / "home"))
    codes = random_codes()
    first = NeighbourTable.of(codes, 5)
    (file,) = (tmp_path / "home" / "neighbours").iterdir()
    assert file.name == f"{codebook_hash(codes)}-5.safetensors"
    monkeypatch.setattr(NeighbourTable, "build", None)
    assert torch.equal(NeighbourTable.of(codes.clone(), 5).indices, first.indices)


def test_other_codes_and_other_widths_have_their_own_tables(tmp_path: Path) -> None:
    codes = random_codes()
    changed = codes.clone()
    changed[3, 1] += 5
    for each in (codes, changed):
        for width in (3, 5):
            table = NeighbourTable.of(each, width, tmp_path)
            assert torch.equal(table.indices, NeighbourTable.build(each, width).indices)
    assert len(list(tmp_path.iterdir())) == 4
    assert codebook_hash(codes) != codebook_hash(codes.reshape(25, 8))


@pytest.mark.parametrize("content", [b"", b"not a table"])
def test_a_damaged_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    codes = random_codes()
    expected = NeighbourTable.of(codes, 5, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    assert torch.equal(NeighbourTable.of(codes, 5, tmp_path).indices, expected.indices)
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = NeighbourTable.of(random_codes(), 5, tmp_path / "file" / "folder")
    assert torch.equal(table.indices, NeighbourTable.build(random_codes(), 5).indices)


@pytest.mark.parametrize(
    ("codes", "num_neighbours", "message"),
    [
        (random_codes(), 50, "from 0 to 49"),
        (random_codes(), -1, "from 0 to 49"),
        (random_codes()[0], 1, r"\[v c\]"),
        (random_codes() / 0, 1, "finite"),
    ],
)
def test_bad_input(codes: torch.Tensor, num_neighbours: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        NeighbourTable.build(codes, num_neighbours)
    with pytest.raises(ValueError, match=message):
        NeighbourTable.of(codes, num_neighbours, tmp_path)
    with pytest.raises(ValueError, match="int32"):
        NeighbourTable(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 codes have 3 neighbours"):
        NeighbourTable(torch.zeros(4, 4, dtype=torch.int32))


def test_a_tokenizer_without_a_codebook_says_so() -> None:
    tokenizer = KLTokenizer(image_size=16, latent_channels=3, dims=(4, 8), depth=1, num_groups=2)
    with pytest.raises(ValueError, match="no codebook"):
        NeighbourTable.of(tokenizer.codebook, 5)
