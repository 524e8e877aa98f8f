"""Section by section what goes wrong for users: one line that names cause and remedy, exit code 2, nothing left."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vistok.data.token_file import TokenFile, save_tokens
from vistok.tokens import Tokens

WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_refused(finished, *words: str, code: int = 2) -> None:
    assert finished.code == code, finished.stderr
    assert finished.stdout == ""
    lines = [line for line in finished.stderr.splitlines() if line.startswith("vistok: error: ")]
    assert len(lines) == 1 and finished.stderr.splitlines()[-1] == lines[0]
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in finished.stderr


def not_an_image(folder: Path) -> Path:
    (folder / "a.png").write_text("not a picture")
    return folder / "a.png"


def truncated_image(folder: Path) -> Path:
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:1500])
    return folder / "half.png"


def empty_folder(folder: Path) -> Path:
    return folder


def tiny_image(folder: Path) -> Path:
    Image.new("RGB", (40, 5)).save(folder / "small.png")
    return folder / "small.png"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (not_an_image, ["a.png is not an image"]),
        (truncated_image, ["half.png is damaged or truncated"]),
        (empty_folder, ["holds no images"]),
        (tiny_image, ["small.png", "40x5, smaller than one 8-pixel patch"]),
        (lambda folder: folder / "nowhere.png", ["nowhere.png does not exist"]),
    ],
)
@pytest.mark.parametrize("command", ["tokenize", "reconstruct"])
def test_images(
    run, model: Path, tmp_path: Path, out: Path, command: str, make: Callable, words: list
) -> None:
    (tmp_path / "in").mkdir()
    name = {"tokenize": "t.safetensors", "reconstruct": "strip.png"}[command]
    finished = run(command, make(tmp_path / "in"), "-o", out / name, "--model", model)
    assert_refused(finished, *words)
    assert not list(out.iterdir())


def test_token_ids_out_of_range(run, model: Path, picture: Path, out: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    run("tokenize", picture, "-o", tmp_path / "t.safetensors", "--model", model)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        metadata = file.metadata()
    data = load_file(tmp_path / "t.safetensors")
    data["indices"][0, 2] = 20
    save_file(data, tmp_path / "bad.safetensors", metadata)
    finished = run("detokenize", tmp_path / "bad.safetensors", "-o", out / "a.png")
    assert_refused(finished, "token id 20 is out of range", "0 to 19")
    assert not list(out.iterdir())


def test_tokens_of_another_model(
    run, model: Path, other_model: Path, picture: Path, out: Path, tmp_path: Path
) -> None:
    run("tokenize", picture, "-o", tmp_path / "t.safetensors", "--model", model)
    finished = run("detokenize", tmp_path / "t.safetensors", "-o", out / "a.png", "--model", other_model)
    assert_refused(finished, "these tokens are of ConvTiTok-", str(model))
    assert not list(out.iterdir())


def test_tokens_of_a_model_that_is_gone(run, picture: Path, out: Path, tmp_path: Path) -> None:
    tokens = Tokens(indices=torch.zeros(1, 6, dtype=torch.int64), codebook_size=20)
    save_tokens(tmp_path / "t.safetensors", TokenFile(tokens, ["a.png"], "ConvTiTok-0", "gone/away.d"))
    finished = run("detokenize", tmp_path / "t.safetensors", "-o", out / "a.png")
    assert_refused(finished, "unknown model 'gone/away.d'")


@pytest.mark.parametrize("content", [b"", b"abc", b"<!doctype html><title>Sign in</title>"])
def test_a_file_that_holds_no_tokens(run, out: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    finished = run("detokenize", tmp_path / "t.safetensors", "-o", out / "a.png")
    assert_refused(finished, "is not a token file, or is truncated")


def missing(weights: Path) -> None:
    weights.unlink()


def truncated(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def renamed(weights: Path) -> None:
    weights.rename(weights.with_name("model.weights"))


def renamed_keys(weights: Path) -> None:
    save_file({f"module.{key}": tensor for key, tensor in load_file(weights).items()}, weights)


@pytest.mark.parametrize("damage", [missing, truncated, renamed, renamed_keys])
def test_weights(run, model: Path, tmp_path: Path, out: Path, damage: Callable) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    damage(folder / "tokenizer" / WEIGHTS)
    finished = run("generate", "cat", "-o", out / "a.png", "--model", folder)
    assert_refused(finished, "does not hold a complete")
    assert not list(out.iterdir())


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_inside_is_refused_and_not_run(
    run, tmp_path: Path, out: Path, save: Callable
) -> None:
    save({"weight": torch.zeros(1), "trap": Trap(tmp_path / "sprung")}, tmp_path / "model.bin")
    for command in (("convert", "titok", tmp_path / "model.bin"), ("info", tmp_path / "model.bin")):
        finished = run(*command, *(("-o", out / "model") if command[0] == "convert" else ()))
        assert_refused(finished, "holds Python objects or code")
    assert not (tmp_path / "sprung").exists() and not list(out.iterdir())


def test_a_web_page_saved_as_a_checkpoint(run, tmp_path: Path, out: Path) -> None:
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>")
    finished = run("convert", "titok", tmp_path / "model.safetensors", "-o", out / "model")
    assert_refused(finished, "is a web page, not a checkpoint", "download")
    assert not list(out.iterdir())


def test_unknown_names_suggest_near_ones(run, picture: Path, out: Path) -> None:
    finished = run("tokenize", picture, "-o", out / "t.safetensors", "--model", "titok-l-23")
    assert_refused(finished, "unknown model 'titok-l-23'", "did you mean 'titok-l-32'")
    finished = run("convert", "titock", picture, "-o", out / "model")
    assert_refused(finished, "unknown system 'titock'; did you mean 'titok'")
    finished = run("train", "emoji-tokenizr", "-o", out / "run")
    assert_refused(finished, "recipe emoji-tokenizr does not exist; did you mean emoji-tokenizer")
    assert not list(out.iterdir())


def test_weights_that_cannot_be_downloaded(
    run, picture: Path, out: Path, tmp_path: Path, monkeypatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path / "home"))
    finished = run("tokenize", picture, "-o", out / "t.safetensors", "--model", "titok-l-32")
    place = tmp_path / "home" / "titok-l-32" / "model.safetensors"
    assert_refused(finished, "yucornetto/tokenizer_titok_l32_imagenet", f"put it at {place}")
    finished = run("tokenize", picture, "-o", out / "t.safetensors", "--model", "someone/something")
    assert_refused(finished, "'someone/something'", "could not be had", "pass their folder")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], ["the prompt is empty"]),
        (["  "], ["the prompt is empty"]),
        (["ok", "--temperature", "0"], ["temperature must be above 0"]),
        (["ok", "--temperature", "-1"], ["temperature must be above 0"]),
        (["ok", "--temperature", "nan"], ["temperature must be above 0"]),
        (["ok", "--top-p", "0"], ["top_p must", "(0, 1]"]),
        (["ok", "--top-p", "1.5"], ["top_p must", "(0, 1]"]),
        (["ok", "--top-k", "0"], ["top_k must be at least 1"]),
        (["ok", "--top-k", "21"], ["top_k 21 is larger than the vocabulary of 20"]),
        (["ok", "--typical-p", "0"], ["typical_p must", "(0, 1]"]),
        (["ok", "--guidance-scale", "0.5"], ["guidance_scale must be at least 1", "got 0.5"]),
        (["ok", "--guidance-scale", "nan"], ["guidance_scale must be at least 1"]),
        (["ok", "--guidance-scale", "1", "--negative", "cat"], ["negative_prompt needs guidance"]),
        (["ok", "--keep-tokens", "2"], ["add --keep-from PICTURE"]),
        (["ok", "--keep-from", "a.png"], ["needs either --keep-region or --keep-tokens"]),
        (["ok", "--keep-from", "a.png", "--keep-tokens", "2"], ["a.png does not exist"]),
        (["ok", "--keep-from", "a.png", "--keep-tokens", "6"], ["--keep-tokens must be in 1..5, got 6"]),
        (["ok", "--keep-from", "a.png", "--keep-region", "top"], ["these are a sequence"]),
        (["ok", "--keep-from", "a.png", "--keep-region", "middle"], ["must be top, bottom, left, right or"]),
        (["ok", "--keep-from", "a.png", "--keep-region", "0,0,1"], ["must be top", "got '0,0,1'"]),
        (["ok", "--device", "tpu"], ["device 'tpu' is not available", "auto", "cpu"]),
        (["ok", "--dtype", "int8"], ["unknown dtype 'int8'", "float32"]),
    ],
)
def test_what_is_asked_of_the_generator(run, model: Path, out: Path, arguments: list, words: list) -> None:
    finished = run("generate", "-o", out / "a.png", "--model", model, *arguments)
    assert_refused(finished, *words)
    assert not list(out.iterdir())


def test_a_prompt_that_is_too_long_is_cut_and_the_user_told(run, model: Path, out: Path) -> None:
    finished = run("generate", "red cat in a tree at night", "-o", out / "a.png", "--model", model)
    assert finished.code == 0
    (line,) = (line for line in finished.stderr.splitlines() if "warning" in line)
    assert line.startswith(
        "vistok: warning: the prompt has 26 bytes and this model reads 16: it was cut after"
    )
    run("generate", "red cat in a tre", "-o", out / "b.png", "--model", model)
    assert (out / "a.png").read_bytes() == (out / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["7"], ["class 7 is out of range", "0 to 4"]),
        (["--", "-1"], ["class -1 is out of range"]),
        (["cat"], ["class names are those of ImageNet"]),
        (["1", "--negative", "9", "--guidance-scale", "2"], ["class 9 is out of range"]),
        (["1", "--num-tokens", "3"], ["no variable-length tokenizer: num_tokens cannot be chosen"]),
        (
            ["1", "--keep-from", "a.png", "--keep-region", "0,0,0.1,0.1"],
            ["smaller than one of the 4x4 tokens"],
        ),
    ],
)
def test_what_is_asked_of_a_model_of_classes(
    run, class_model: Path, out: Path, arguments: list, words: list
) -> None:
    finished = run("generate", "-o", out / "a.png", "--model", class_model, *arguments)
    assert_refused(finished, *words)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "arguments", [["cat", "--num-images", "0"], ["cat", "--seed", "-1"], ["cat", "--temperature", "warm"], []]
)
def test_usage_errors_exit_with_2(run, model: Path, out: Path, arguments: list) -> None:
    finished = run("generate", "-o", out / "a.png", "--model", model, *arguments)
    assert finished.code == 2 and finished.stdout == "" and "Error: " in finished.stderr
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "cat", "-o", "{}/nowhere/a.png"),
        ("generate", "cat", "-o", "{}/nowhere/new/"),
        ("tokenize", "a.png", "-o", "{}/nowhere/t.safetensors"),
        ("detokenize", "t.safetensors", "-o", "{}/nowhere/a.png"),
        ("reconstruct", "a.png", "-o", "{}/nowhere/strip.png"),
        ("convert", "titok", "w.safetensors", "-o", "{}/nowhere/model"),
    ],
)
def test_a_missing_output_folder_is_found_before_the_work(
    run, out: Path, monkeypatch, command: tuple
) -> None:
    def must_not_run(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr("vistok.hub.load", must_not_run)
    monkeypatch.setattr("vistok.models.upstream.read_checkpoint", must_not_run)
    finished = run(*(part.format(out) for part in command))
    assert_refused(finished, f"output folder {out / 'nowhere'} does not exist; create it first")
    assert not list(out.iterdir())


def test_an_output_that_cannot_be_written(run, model: Path, out: Path, monkeypatch) -> None:
    assert_refused(run("generate", "cat", "-o", out / "a.xyz", "--model", model), "must end in .png")
    assert_refused(run("tokenize", out, "-o", out, "--model", model), "is a folder; name a file in it")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert_refused(run("generate", "cat", "-o", out / "a.png", "--model", model), "no permission to write in")
    assert not list(out.iterdir())


def test_convert_never_overwrites(run, tmp_path: Path, out: Path) -> None:
    (out / "precious").write_text("work")
    finished = run("convert", "titok", tmp_path / "w.safetensors", "-o", out)
    assert_refused(finished, "exists already", "nothing is overwritten")
    assert (out / "precious").read_text() == "work"


def stops_after_some_bytes(error: BaseException) -> Callable:
    def save(self: object, path: Path, *args: object, **kwargs: object) -> None:
        Path(path).write_bytes(b"some bytes")
        raise error

    return save


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "code", "word"), [(FULL, 2, "disk full"), (KeyboardInterrupt(), 130, "interrupted")]
)
@pytest.mark.parametrize("place", ["a.png", "", "new/"])
def test_full_disk_and_ctrl_c_leave_nothing(run, model, out, monkeypatch, error, code, word, place) -> None:
    monkeypatch.setattr("PIL.Image.Image.save", stops_after_some_bytes(error))
    finished = run("generate", "cat", "-o", f"{out}/{place}", "--model", model)
    assert_refused(finished, word, code=code)
    assert not list(out.iterdir())


def test_an_old_result_survives_a_full_disk(run, model: Path, picture: Path, out: Path, monkeypatch) -> None:
    (out / "t.safetensors").write_text("old")

    def save(tensors: object, path: Path, metadata: object) -> None:  # in the words of safetensors
        Path(path).write_bytes(b"some bytes")
        raise SafetensorError(
            'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
        )

    monkeypatch.setattr("vistok.data.token_file.save_file", save)
    finished = run("tokenize", picture, "-o", out / "t.safetensors", "--model", model)
    assert_refused(finished, "disk full", "free some space")
    assert [path.name for path in out.iterdir()] == ["t.safetensors"]
    assert (out / "t.safetensors").read_text() == "old"


def test_ctrl_c_while_drawing(run, model: Path, out: Path, monkeypatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vistok.pipelines.drawing.generate_ordered", interrupted)
    finished = run("generate", "cat", "-o", f"{out}/new/", "--model", model)
    assert_refused(finished, "interrupted", code=130)
    assert not list(out.iterdir())
