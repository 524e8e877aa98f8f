from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.pipelines.families import make_pipeline
from tests.tiny import save_tiny_pipeline


@dataclass
class Finished:
    """What a command left: exit code, standard output and error."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image pipeline."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline that draws five classes on a grid of 4 x 4 tokens, row by row."""
    folder = tmp_path_factory.mktemp("models") / "classes"
    make_pipeline("llamagen-class").save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs `vistok ARGUMENTS` in this process."""
    from vistok.cli.main import main

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Finished(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture with some content."""
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for results."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
