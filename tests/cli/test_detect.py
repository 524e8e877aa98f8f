"""`vistok generate --watermark` and `vistok detect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import vistok
from vistok.data.images import load_image
from vistok.data.token_file import TokenFile, save_tokens
from vistok.decoding import watermark
from vistok.decoding.watermark import Watermark, WatermarkKey
from vistok.tokens import Tokens


def test_generate_marks_with_the_list_of_each_seed(run, model: Path, out: Path) -> None:
    options = ("--model", model, "--num-images", 2, "--seed", 3, "--watermark-strength", 30)
    finished = run("generate", "cat", "dog", "-o", f"{out}/", *options, "--watermark", "secret")
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["watermark_strength"] == 30
    assert "secret" not in finished.stdout + finished.stderr
    mark = Watermark.for_seeds(WatermarkKey("secret", 20), [3, 4, 3, 4], 30)
    pipeline = vistok.load(model)
    settings = {"num_images_per_prompt": 2, "seed": 3, "logits_processor": mark}
    tokens = pipeline(["cat", "dog"], output_type="tokens", **settings).images
    lists = WatermarkKey("secret", 20).green_lists()
    for row, seed in zip(tokens.data, [3, 4, 3, 4], strict=True):
        assert lists[WatermarkKey("secret", 20).list_of(seed)][row].all()  # so strong that all are green
    expected = pipeline(["cat", "dog"], **settings).images
    for file, picture in zip(sorted(out.iterdir()), expected, strict=True):
        assert Image.open(file).tobytes() == picture.tobytes()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Tokens of two images: one of green codes alone, one of the others."""
    is_green = WatermarkKey("secret", 200).green_lists()[2]
    rows = [codes.nonzero()[:30, 0] for codes in (is_green, ~is_green)]
    content = TokenFile(
        Tokens(indices=torch.stack(rows), codebook_size=200), ["green.png", "red.png"], "Some tokenizer", "m"
    )
    save_tokens(tmp_path / "t.safetensors", content)
    return tmp_path / "t.safetensors"


def test_detect_reads_token_files_without_their_tokenizer(run, token_file: Path) -> None:
    finished = run("detect", token_file, "--key", "secret", "--model", "not-a-model")
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    green, red = report["images"]
    assert (green["source"], green["num_tokens"], green["list"]) == ("green.png", 30, 2)
    assert green["is_marked"] and green["p_value"] < 1e-8 and green["z_score"] > 5
    assert not red["is_marked"] and red["p_value"] > 0.01
    assert (report["num_images"], report["num_marked"], report["false_positive_rate"]) == (2, 1, 0.01)
    assert "secret" not in finished.stdout
    other = json.loads(run("detect", token_file, "--key", "another").stdout)
    assert other["num_marked"] == 0
    strict = json.loads(run("detect", token_file, "--key", "secret", "--false-positive-rate", 1e-12).stdout)
    assert strict["num_marked"] == 0


def test_detect_encodes_pictures(run, model: Path, picture: Path, token_file: Path) -> None:
    finished = run("detect", picture, token_file, "--key", "secret", "--model", model, "--num-tokens", 4)
    assert finished.code == 0, finished.stderr
    images = json.loads(finished.stdout)["images"]
    assert [image["source"] for image in images] == ["green.png", "red.png", str(picture)]
    tokenizer = vistok.load(model / "tokenizer")
    tokens = tokenizer.encode(load_image(picture, 16)[None], 4)
    expected = watermark.detect(tokens, WatermarkKey("secret", 20))[0]
    assert images[-1]["num_tokens"] == 4
    assert images[-1]["p_value"] == pytest.approx(expected.p_value, rel=1e-3)
    assert images[-1]["z_score"] == pytest.approx(expected.z_score, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--key", ""), "the watermark's key is empty"),
        (("--key", "k", "--false-positive-rate", 0), "between 0 and 1, got 0"),
        (("--key", "k", "--false-positive-rate", "nan"), "between 0 and 1, got nan"),
        (("--key", "k", "--num-tokens", 7), "num_tokens must be in 1..6"),
    ],
)
def test_bad_input(run, model: Path, picture: Path, arguments: tuple, message: str) -> None:
    finished = run("detect", picture, "--model", model, *arguments)
    assert finished.code == 2 and message in finished.stderr


def test_bad_input_to_generate(run, model: Path, out: Path) -> None:
    for arguments, message in (
        (("--watermark-strength", 3), "--watermark-strength needs --watermark KEY"),
        (("--watermark", ""), "the watermark's key is empty"),
        (("--watermark", "k", "--watermark-strength", "inf"), "strength must be at least 0, got inf"),
    ):
        finished = run("generate", "cat", "-o", out / "cat.png", "--model", model, *arguments)
        assert finished.code == 2 and message in finished.stderr
    assert not list(out.iterdir())
