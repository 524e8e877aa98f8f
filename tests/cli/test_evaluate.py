from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import vistok
from vistok.cli.evaluate import samples
from vistok.eval.distances import FeatureDistance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.effect_noise((16, 16), 40 + number).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


class Means:
    """A stand-in extractor: the mean of each channel."""

    name, dim, weights, weights_sha256, preprocessing, remark = "means", 3, "none", "0" * 64, "none", ""
    device = torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def asked_for(monkeypatch) -> list:
    """What `load_extractor` was asked for; it gives `Means`."""
    asked = []

    def load_extractor(name: str, *, weights_path: Path | None, device: str) -> Means:
        asked.append((name, weights_path, device))
        return Means()

    monkeypatch.setattr("vistok.eval.features.load_extractor", load_extractor)
    return asked


def test_fid_of_two_folders(run, folder: Path, asked_for: list) -> None:
    finished = run("eval", "fid", folder, folder, "--extractor-weights", "w.pth", "--device", "cpu")
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["command"] == "eval fid" and report["num_real"] == report["num_fake"] == 4
    assert report["fid"] == pytest.approx(0, abs=1e-3)
    assert asked_for == [("inception-v3-compat", Path("w.pth"), "cpu")]


def test_fid_of_a_model(run, folder: Path, model: Path, tmp_path: Path, asked_for: list) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n\ndog\n")
    command = ("eval", "fid", folder, model, "--extractor", "efficientnet-lite0", "--device", "cpu")
    options = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--num-images",
        5,
        "--batch-size",
        2,
        "--seed",
        7,
        "--top-k",
        3,
    )
    finished = run(*command, *options)
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["num_fake"] == 5 and report["fake"] == report["model"] == str(model)
    assert report["sampling"]["top_k"] == 3 and report["num_prompts"] == 2 and report["seed"] == 7
    assert asked_for == [("efficientnet-lite0", None, "cpu")]
    finished = run(*command)
    assert finished.code == 2 and "give --prompts FILE" in finished.stderr


def test_sample_i_does_not_depend_on_the_batches(model: Path) -> None:
    pipeline = vistok.load(model)
    whole, parts = (
        torch.cat(list(samples(pipeline, ["cat", "dog"], 5, seed=7, batch_size=size))) for size in (5, 2)
    )
    assert whole.shape == (5, 3, 16, 16) and whole.dtype == torch.uint8
    assert torch.equal(whole, parts)
    assert len({image.numpy().tobytes() for image in whole}) > 1


def test_reconstruction(run, folder: Path, model: Path) -> None:
    finished = run("eval", "reconstruction", folder, "--model", model)
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["num_images"] == 4 and report["codebook_size"] == 20 and report["psnr"] > 0


@pytest.mark.parametrize(
    "command",
    [
        ("fid", "nowhere", "nowhere"),
        ("reconstruction", "nowhere"),
        ("rate-distortion", "nowhere", "-o", "out"),
    ],
)
def test_a_missing_folder(run, command: tuple) -> None:
    finished = run("eval", *command)
    assert finished.code == 2 and "nowhere does not exist" in finished.stderr


@pytest.fixture
def no_weights(monkeypatch, tmp_path: Path) -> None:
    """LPIPS cannot be had; the packaged distance is replaced by that of mean colours."""

    def load_distance(name: str, device: str):
        if name == "lpips":
            raise FileNotFoundError("LPIPS needs vgg16.pth, and it could not be downloaded. Put it there")
        return FeatureDistance(Means())

    monkeypatch.setattr("vistok.eval.distances.load_distance", load_distance)


def test_rate_distortion(run, folder: Path, model: Path, tmp_path: Path, no_weights, caplog) -> None:
    out = tmp_path / "curves"
    command = ("eval", "rate-distortion", folder, "-o", out, "--codecs", "jpeg")
    finished = run(*command, "--model", model, "--num-tokens", "1,6", "--num-images", 3)
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["num_images"] == 3 and report["image_size"] == [16, 16]
    assert [point["value"] for point in report["points"] if point["method"] == "tiny"] == [1, 6]
    assert report["points"][-1]["method"] == "jpeg" and set(report["distances"]) == {"means"}
    assert report["unavailable"] == {"lpips": "LPIPS needs vgg16.pth, and it could not be downloaded"}
    assert "lpips is not measured" in caplog.text and "Put it there" in caplog.text
    assert {str(path) for path in out.iterdir()} == set(report["output"])
    assert str(tmp_path) not in (out / "rate-distortion.json").read_text()


def test_rate_distortion_refuses_what_cannot_be_compared(
    run, folder: Path, model: Path, tmp_path: Path, no_weights
) -> None:
    out = tmp_path / "curves"
    for options, message in [
        (("--codecs", "jpegxl"), "unknown codec 'jpegxl'"),
        (("--codecs", "none"), "give one or more methods"),
        (("--codecs", "none", "--model", model, "--image-size", 32), "all methods must code the same pixels"),
        (("--codecs", "none", "--model", model, "--num-tokens", "1,x"), "--num-tokens takes whole numbers"),
        (("--codecs", "none", "--model", model, "--num-tokens", "99"), "decodes 1 to 6 tokens, not 99"),
        (("--num-images", 99), "num_images must be in 1..4"),
    ]:
        finished = run("eval", "rate-distortion", folder, "-o", out, "--distances", "none", *options)
        assert finished.code == 2 and message in finished.stderr, finished.stderr
    assert not out.exists()
