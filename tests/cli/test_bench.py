"""`vistok bench` is a thin front of `vistok.eval.speed`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vistok.eval import speed
from vistok.eval.speed_families import FAMILIES


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `run` was asked for; it measures nothing."""
    calls: list[Any] = []

    def run(selections: Any, folder: Path, device: str, *, write: Any) -> Any:
        calls.append((selections, folder, device))
        return SimpleNamespace(measurements=[1, 2], skipped={"a": "b"}, machine="here", device=device)

    monkeypatch.setattr(speed, "run", run)
    return calls


def test_options_narrow_the_selection(run: Any, asked: list[Any], tmp_path: Path) -> None:
    narrow = [
        "--families",
        "nar-b, llamagen-b",
        "--dtypes",
        "bfloat16",
        "--batch-sizes",
        "1,8",
        "--ways",
        "plain",
    ]
    finished = run(
        "bench", "-o", tmp_path / "new", "--quick", "--device", "cpu", "--repeats", 2, "--longest", 3, *narrow
    )
    assert finished.code == 0, finished.stderr
    facts = json.loads(finished.stdout)
    assert (facts["command"], facts["num_cells"], facts["skipped"]) == ("bench", 2, {"a": "b"})
    ((*_, chosen), folder, device), *_ = asked
    assert (chosen.families, chosen.dtypes) == (("nar-b", "llamagen-b"), ("bfloat16",))
    assert (chosen.batch_sizes, chosen.repeats, chosen.longest, chosen.ways) == ((1, 8), 2, 3.0, ("plain",))
    assert folder == tmp_path / "new" and folder.is_dir() and device == "cpu"


def test_the_default_covers_every_family(run: Any, asked: list[Any], tmp_path: Path) -> None:
    assert run("bench", "-o", tmp_path).code == 0
    selections = asked[0][0]
    assert selections[-1].families == tuple(FAMILIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--families", "titok-xxl"], "unknown 'titok-xxl' in families"),
        (["--batch-sizes", "1,many"], "batch sizes are whole numbers"),
        (["--preset", "slow"], "unknown preset 'slow'"),
    ],
)
def test_bad_input(run: Any, asked: list[Any], tmp_path: Path, options: list[str], message: str) -> None:
    finished = run("bench", "-o", tmp_path / "new", *options)
    assert finished.code == 2 and message in finished.stderr and not asked
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(run: Any, tmp_path: Path) -> None:
    finished = run("bench", "-o", tmp_path / "a" / "b")
    assert finished.code == 2 and "does not exist" in finished.stderr
