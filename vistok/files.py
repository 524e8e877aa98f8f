"""Where files are kept, and writing them so that nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def home_folder() -> Path:
    """Where files are kept between runs: `$VISTOK_HOME`, or `~/.cache/vistok`. It need not exist."""
    return Path(os.environ.get("VISTOK_HOME", Path.home() / ".cache" / "vistok"))


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """A temporary path beside `target` to write a file or folder to; renamed to `target` if the block succeeds.

    On any error, Ctrl-C and a full disk included, the temporary path is removed and `target` stays as it was.

    Raises:
        FileNotFoundError: the folder that should hold `target` does not exist.
    """
    target = Path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"folder {target.parent} does not exist; create it first")
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        partial = scratch / target.name  # keeps the suffix, by which savers choose the format
        yield partial
        if target.is_dir():
            os.replace(target, scratch / "replaced")
        os.replace(partial, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
