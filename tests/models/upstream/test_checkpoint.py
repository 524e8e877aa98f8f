"""Reading published files: what is not a plain dictionary of tensors is refused in one line."""

from __future__ import annotations

import argparse
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


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrapper: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {
        "ema": {key: tensor + 1 for key, tensor in WEIGHTS.items()},
        wrapper: WEIGHTS,
        "optimizer": optimizer.state_dict(),
        "discriminator": {"main.0.weight": torch.ones(2)},
        "steps": 300,
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), compile=True, data_path=None),
    }
    torch.save(content, tmp_path / "last.pt")
    weights = read_checkpoint(tmp_path / "last.pt")
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in WEIGHTS.items())
    # allowed for that one read only
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "last.pt", weights_only=True)


def test_averaged_weights_of_mar_come_first(tmp_path: Path) -> None:
    last = {key: tensor + 1 for key, tensor in WEIGHTS.items()}
    torch.save({"model": last, "model_ema": WEIGHTS, "epoch": 799}, tmp_path / "checkpoint-last.pth")
    weights = read_checkpoint(tmp_path / "checkpoint-last.pth")
    assert all(torch.equal(weights[key], tensor) for key, tensor in WEIGHTS.items())


def test_tensors_with_attributes_and_parameters_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    tensor.was_sharded = True  # saved through torch's type-v2 helper, as those of the 3B LlamaGen
    torch.save({"a": tensor, "b": torch.nn.Parameter(torch.ones(2))}, tmp_path / "weights.pt")
    weights = read_checkpoint(tmp_path / "weights.pt")
    assert torch.equal(weights["a"], torch.arange(4.0)) and torch.equal(weights["b"], torch.ones(2))


@pytest.mark.parametrize("place", ["beside", "args", "inside"])
def test_code_in_a_wrapped_checkpoint_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    path, target = tmp_path / "last.pt", tmp_path / "made-by-the-payload"
    payload = _Payload(target)
    content = {
        "beside": {"model": WEIGHTS, "optimizer": payload},
        "args": {"model": WEIGHTS, "args": argparse.Namespace(lr=payload)},
        "inside": {"model": {**WEIGHTS, "b": payload}},
    }[place]
    torch.save(content, path)
    _refused(path, "refused")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the payload was live


def test_a_state_dict_may_have_a_tensor_of_a_wrappers_name(tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "model": torch.zeros(2)}, tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt").keys() == {*WEIGHTS, "model"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], ["holds a list, not a dictionary of tensors"]),
        ({}, ["holds an empty dictionary"]),
        ({"step": 3}, ["'step' holds a int"]),
        ({1: torch.zeros(1)}, ["1 holds a Tensor"]),
        ({"model": {}, "steps": 3}, ["under 'model' holds an empty dictionary"]),
        ({"model": 3}, ["under 'model' holds a int"]),
        ({"model": {"sd": WEIGHTS, "name": "x"}}, ["under 'model'", "'sd' holds a dict"]),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, ["each of model, state_dict"]),
        ({"ema": WEIGHTS}, ["'ema' holds a dict", "model, module, state_dict", "save any other alone"]),
    ],
)
def test_no_or_several_state_dicts(tmp_path: Path, content: object, words: list[str]) -> None:
    torch.save(content, tmp_path / "weights.bin")
    _refused(tmp_path / "weights.bin", *words)


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
