from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vistok.files import atomic_path

FAILURES = [ValueError("bad"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.png") as partial:
        assert (
            partial.suffix == ".png" and partial.parent.parent == tmp_path
        )  # same file system: rename is atomic
        partial.write_text("new")
        assert not (tmp_path / "a.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "new"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), atomic_path(tmp_path / "a") as partial:
        partial.write_text("half")
        raise failure
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_keeps_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(failure)), atomic_path(tmp_path / "a") as partial:
        partial.write_text("half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_files_and_folders_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with atomic_path(tmp_path / "file") as partial:
        partial.write_text("new")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="nowhere does not exist; create it first"),
        atomic_path(tmp_path / "nowhere" / "a"),
    ):
        raise AssertionError("the block must not run")
    assert not list(tmp_path.iterdir())
