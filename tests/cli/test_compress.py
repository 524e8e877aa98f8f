"""`vistok compress` and `vistok decompress`, and every file that is not what it should be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vistok
from tests.cli.test_bad_input import assert_refused
from vistok.data.images import load_image, to_pil


@pytest.fixture
def compressed(run, model: Path, picture: Path, tmp_path: Path) -> Path:
    """`picture`, compressed with `model`."""
    assert run("compress", picture, "-o", tmp_path / "photo.vtk", "--model", model).code == 0
    return tmp_path / "photo.vtk"


@pytest.mark.parametrize("prior", [[], ["--prior"]])
def test_there_and_back(run, model: Path, picture: Path, out: Path, prior: list) -> None:
    command = ("compress", picture, "--model", model, "--num-tokens", 4, *prior)
    finished = run(*command, "-o", out / "photo.vtk")
    assert finished.code == 0, finished.stderr
    facts = json.loads(finished.stdout)
    size = (out / "photo.vtk").stat().st_size
    assert facts["bytes"] == size and facts["bits_per_pixel"] == pytest.approx(8 * size / 16**2, abs=1e-4)
    assert facts["num_tokens"] == 4 and facts["original_size"] == [24, 20]
    assert facts["entropy_model"].startswith("TextAR-" if prior else "uniform")
    run(*command, "-o", out / "again.vtk")
    assert (out / "again.vtk").read_bytes() == (out / "photo.vtk").read_bytes()

    finished = run("decompress", out / "photo.vtk", "-o", out / "photo.png", "--model", model)
    assert finished.code == 0, finished.stderr
    tokenizer = vistok.load(model / "tokenizer")
    image = load_image(picture, 16)[None]
    expected = np.asarray(to_pil(tokenizer.decode(tokenizer.encode(image, 4)))[0])
    assert np.array_equal(np.asarray(Image.open(out / "photo.png")), expected)
    mse = np.square(expected.astype(float) - np.asarray(to_pil(image)[0])).mean()
    assert facts["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)


def test_the_size_of_the_square_that_was_cut_out(run, model: Path, compressed: Path, out: Path) -> None:
    finished = run("decompress", compressed, "-o", out / "photo.png", "--model", model, "--original-size")
    assert finished.code == 0, finished.stderr
    assert Image.open(out / "photo.png").size == (20, 20)
    assert json.loads(finished.stdout)["size"] == [20, 20]


def test_as_few_tokens_as_give_a_quality(run, model: Path, picture: Path, out: Path, caplog) -> None:
    command = ("compress", picture, "-o", out / "photo.vtk", "--model", model, "--target-psnr")
    assert json.loads(run(*command, 1).stdout)["num_tokens"] == 1
    assert json.loads(run(*command, 90).stdout)["num_tokens"] == 6
    assert "miss the target" in caplog.text


def test_files_name_models_that_everybody_has(run, model, picture, out, tmp_path, monkeypatch) -> None:
    shutil.copytree(model, tmp_path / "zoo" / "tiny-16")
    monkeypatch.setattr("vistok.zoo.ZOO", tmp_path / "zoo")
    assert run("compress", picture, "-o", out / "photo.vtk", "--model", "tiny-16", "--prior").code == 0
    finished = run("decompress", out / "photo.vtk", "-o", out / "photo.png")
    assert finished.code == 0 and json.loads(finished.stdout)["model"] == "tiny-16"
    monkeypatch.undo()
    (out / "photo.png").unlink()
    finished = run("decompress", out / "photo.vtk", "-o", out / "photo.png")
    assert_refused(finished, "photo.vtk: made with 'tiny-16', which is unknown here", "--model")
    assert not (out / "photo.png").exists()


def test_folders_are_not_named(model: Path, compressed: Path) -> None:
    assert model.name.encode() not in compressed.read_bytes()


def damaged(data: bytes) -> bytes:
    return data[:20] + bytes([data[20] ^ 4]) + data[21:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged, "photo.vtk: damaged or truncated: the checksum is wrong"),
        (lambda data: data[:-1], "photo.vtk: damaged or truncated"),
        (lambda data: data + b"\n", "photo.vtk: damaged or truncated"),
        (lambda data: b"", "photo.vtk: not a file that `vistok compress` wrote"),
        (lambda data: b"<!doctype html>", "photo.vtk: not a file that `vistok compress` wrote"),
    ],
)
def test_files_that_are_not_whole(run, model, compressed: Path, out: Path, change, words: str) -> None:
    compressed.write_bytes(change(compressed.read_bytes()))
    finished = run("decompress", compressed, "-o", out / "photo.png", "--model", model)
    assert_refused(finished, words)
    assert not list(out.iterdir())


def test_files_of_other_weights(run, other_model: Path, compressed: Path, out: Path) -> None:
    finished = run("decompress", compressed, "-o", out / "photo.png", "--model", other_model)
    assert_refused(finished, "photo.vtk: made with the tokenizer ...-", "and not with ConvTiTok-")
    assert not list(out.iterdir())


def test_a_prior_needs_the_generator(run, model: Path, picture: Path, out: Path, tmp_path: Path) -> None:
    finished = run("compress", picture, "-o", out / "a.vtk", "--model", model / "tokenizer", "--prior")
    assert_refused(finished, "is a ConvTiTok, not a pipeline")
    run("compress", picture, "-o", tmp_path / "photo.vtk", "--model", model, "--prior")
    finished = run(
        "decompress", tmp_path / "photo.vtk", "-o", out / "photo.png", "--model", model / "tokenizer"
    )
    assert_refused(finished, "is a ConvTiTok, not a pipeline")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-tokens", "0"], "num_tokens must be in 1..6"),
        (["--num-tokens", "7"], "num_tokens must be in 1..6"),
        (["--num-tokens", "3", "--target-psnr", "20"], "--num-tokens or --target-psnr, not both"),
        (["--target-psnr", "nan"], "the target is not a number"),
    ],
)
def test_what_cannot_be_asked_for(run, model, picture, out, arguments: list, words: str) -> None:
    finished = run("compress", picture, "-o", out / "photo.vtk", "--model", model, *arguments)
    assert_refused(finished, words)
    assert not list(out.iterdir())


def test_places_and_names(run, model: Path, picture: Path, compressed: Path, out: Path) -> None:
    assert_refused(run("compress", picture, "-o", out / "photo.jpg", "--model", model), "must end in .vtk")
    assert_refused(run("compress", picture, "-o", out / "no" / "a.vtk"), "does not exist; create it first")
    assert_refused(run("compress", out / "no.png", "-o", out / "a.vtk"), "image", "does not exist")
    assert_refused(run("compress", compressed, "-o", out / "a.vtk"), "is not an image")
    assert_refused(run("decompress", compressed, "-o", out / "photo.txt"), "must end in .png")
    assert_refused(
        run("decompress", out / "no.vtk", "-o", out / "a.png"), "no.vtk does not exist or is not a file"
    )
    assert_refused(run("decompress", out, "-o", out / "a.png"), "does not exist or is not a file")
    small = out.parent / "small.png"
    Image.new("RGB", (40, 5)).save(small)
    assert_refused(
        run("compress", small, "-o", out / "a.vtk", "--model", model),
        "small.png",
        "smaller than one 8-pixel patch",
    )
    assert not list(out.iterdir())


def test_without_constriction(run, model: Path, picture: Path, out: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    finished = run("compress", picture, "-o", out / "photo.vtk", "--model", model)
    assert_refused(finished, "pip install 'vistok[codec]'")
    assert not list(out.iterdir())
