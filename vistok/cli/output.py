"""Where results go: checked before the work begins, written whole or not at all; and the report on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import vistok
from vistok.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def report(command: str, **facts: Any) -> None:
    """One line of JSON on stdout: what was done and how."""
    typer.echo(json.dumps({"command": command, **facts, "vistok": vistok.__version__}, allow_nan=False))


def check_file(path: Path, suffixes: Sequence[str]) -> Path:
    """`path`, if a file of that kind can be written there.

    Raises:
        ValueError: it is a folder, or its suffix is not one of `suffixes`.
        FileNotFoundError, PermissionError: see `check_folder`.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as {path / f'out{suffixes[0]}'}")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path.name!r}: its name must end in {' or '.join(suffixes)}")
    check_folder(path.parent)
    return path


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError or PermissionError unless files can be made in `folder`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"output folder {folder} does not exist; create it first: mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {folder}; choose another output folder")


def check_new_folder(folder: Path) -> Path:
    """`folder`, if it can be made: it is not there, or empty.

    Raises:
        ValueError: it holds files, or is one.
        FileNotFoundError, PermissionError: see `check_folder`.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; choose a new folder, nothing is overwritten")
    check_folder(folder.parent)
    return folder


@dataclass(frozen=True)
class PictureOutput:
    """A place for pictures: one file, or a folder with a PNG for each of them."""

    path: Path
    is_folder: bool

    @classmethod
    def parse(cls, text: str) -> PictureOutput:
        """A folder if `text` ends with a slash or is one, otherwise a file; checked as by `check_file`."""
        path = Path(text)
        is_folder = path.is_dir() or text.endswith(("/", os.sep))
        if is_folder:
            check_folder(path if path.exists() else path.parent)
        else:
            check_file(path, PICTURE_SUFFIXES)
        return cls(path, is_folder)

    def save(self, pictures: Sequence[Image], labels: Sequence[str], columns: int = 6) -> None:
        """All `pictures` to the folder; or to the file, several as a grid with their labels."""
        from vistok.eval.pictures import grid

        if self.is_folder:
            with filled_folder(self.path) as folder:
                for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                    picture.save(folder / f"{number:03d}-{_file_name(label)}.png")
        else:
            picture = pictures[0] if len(pictures) == 1 else grid(pictures, labels, columns)
            with atomic_path(self.path) as partial:
                picture.save(partial)


@contextlib.contextmanager
def filled_folder(target: Path) -> Iterator[Path]:
    """A temporary folder whose files end up in `target`, new or not, if the block succeeds."""
    if not target.exists():
        with atomic_path(target) as partial:
            partial.mkdir()
            yield partial
        return
    with tempfile.TemporaryDirectory(dir=target, prefix=".vistok-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, target / file.name)


def _file_name(label: str) -> str:
    return re.sub(r"\W+", "-", label).strip("-")[:40] or "image"
