"""Reading published files: what is not a plain dictionary of tensors is refused in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vistok.models.upstream import load_config, read_checkpoint

WEIGHTS = {"a.weight": torch.arange(2000.0), "a.bias": torch.zeros(3)}


@pytest.mark.parametrize("kind", ["safetensors", "zip pickle", "old pickle"])
def test_reads_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path / "weights.any", kind)
    weights = read_checkpoint(path)
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in WEIGHTS.items())


@pytest.mark.parametrize("kind", ["safetensors", "zip pickle", "old pickle"])
@pytest.mark.parametrize("kept", [3, 60, 300, -100])
def test_truncated(tmp_path: Path, kind: str, kept: int) -> None:
    path = _write(tmp_path / "weights.bin", kind)
    path.write_bytes(path.read_bytes()[:kept])
    _refused(path, "truncated")


def _write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip pickle")
    return path


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.bin")
    (tmp_path / "empty.bin").touch()
    _refused(tmp_path / "empty.bin", "empty")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("\n<!DOCTYPE html><html><title>404</title></html>", "web page"),
        ("<html>Access denied</html>", "web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        ("just some text", "not a checkpoint"),
    ],
)
def test_text_saved_as_a_checkpoint(tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(content)
    _refused(path, word)


class _Payload:
    """Unpickled carelessly, this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "weights.bin", tmp_path / "made-by-the-payload"
    content = {**WEIGHTS, "b": _Payload(target)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    _refused(path, "refused")
    assert not target.exists()
    torch.load(path, weights_only=False) if kind != "bare" else pickle.loads(path.read_bytes())
    assert target.exists()  # the payload was live


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"model": WEIGHTS}, {"step": 3}, {1: torch.zeros(1)}])
def test_not_a_flat_dictionary(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.bin")
    _refused(tmp_path / "weights.bin", "dictionary of tensors")


def test_configurations(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": {"b": 3}, "c": ["${a.b}", "$x"]}')
    assert load_config(tmp_path / "a.json") == {"a": {"b": 3}, "c": [3, "$x"]}
    (tmp_path / "a.yaml").write_text("a: {b: 3}\nc: ${a}\n")
    assert load_config(tmp_path / "a.yaml")["c"] == {"b": 3}
    for name, text in {"bad.json": "{", "list.json": "[1]", "bad.yaml": "a: ["}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            load_config(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "absent.json")
