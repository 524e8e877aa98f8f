"""`vistok eval speculative`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SMALL = ("--num-images", 4, "--batches", "1,2", "--repeats", 1, "--device", "cpu", "--lantern-k", "3")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path / "home"))


def test_rows_and_files(run, class_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = ("eval", "speculative", "-o", out, "--model", class_model, *SMALL)
    options = (
        "--drafter",
        "jacobi@chain-2",
        "--drafter",
        "neighbours",
        "--lantern-k",
        "3",
        "--lantern-delta",
        "0.5",
    )
    finished = run(*command, *options, "--guidance-scale", 1.5)
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["command"] == "eval speculative"
    assert [(row["drafter"], row["rule"]) for row in report["rows"]] == [
        ("Jacobi", "strict"),
        ("Jacobi", "LANTERN k 3, δ 0.5"),
        ("neighbour copies", "strict"),
        ("neighbour copies", "LANTERN k 3, δ 0.5"),
    ]
    assert report["protocol"]["sampling"]["guidance_scale"] == 1.5
    assert report["protocol"]["num_timed"] == 2 and report["protocol"]["batch_sizes"] == [1, 2]
    assert {str(path) for path in out.iterdir()} == set(report["output"])
    assert str(tmp_path) not in (out / "speculative.json").read_text()


def test_bad_input(run, model: Path, class_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    for options, message in [
        (("--model", model), "give the folder of the emoji set with --data"),
        (("--model", class_model, "--drafter", "jacobi@2x1"), "cannot draft '2x1'"),
        (("--model", class_model, "--drafter", "jacobi@bush"), "unknown tree 'bush'"),
        (("--model", class_model, "--accept", "loose"), "unknown rule 'loose'"),
        (("--model", class_model, "--lantern-k", "99"), "k must be in 0..19"),
        (("--model", class_model, "--lantern-delta", "much"), "--lantern-delta takes numbers"),
        (("--model", class_model, "--batches", "9"), "at least as many as the largest batch"),
    ]:
        finished = run("eval", "speculative", "-o", out, *SMALL, *options)
        assert finished.code == 2 and message in finished.stderr, finished.stderr
    finished = run("eval", "speculative", "-o", tmp_path / "no" / "folder", "--model", class_model)
    assert finished.code == 2 and "does not exist" in finished.stderr
