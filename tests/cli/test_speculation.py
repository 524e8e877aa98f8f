"""`vistok generate --decoding speculative`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vistok
from tests.cli.test_bad_input import assert_refused
from vistok.cli import speculation
from vistok.decoding.speculative.drafters import JacobiDrafter
from vistok.pipelines.speculation import SpeculativeDecoding


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Where tables and measurements are remembered."""
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_image_is_what_the_library_draws_and_the_passes_are_reported(run, class_model, out) -> None:
    options = ("--decoding", "speculative", "--drafter", "jacobi", "--compare")
    finished = run("generate", "3", "-o", out / "3.png", "--model", class_model, "--seed", 5, *options)
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["decoding"] == "speculative" and report["plain_seconds"] > 0
    assert report["speculation"]["drafter"] == "JacobiDrafter" and report["speculation"]["lossless"]
    assert report["speculation"]["target_passes"] < 16 and report["speculation"]["draft_passes"] == 0
    assert report["speculation"]["mean_accepted_length"] > 1
    pipeline = vistok.load(class_model)
    expected = pipeline(3, seed=5, speculation=SpeculativeDecoding(JacobiDrafter())).images[0]
    assert np.array_equal(np.asarray(Image.open(out / "3.png")), np.asarray(expected))


def test_lantern_and_a_small_generator(run, class_model, out) -> None:
    drafter = Path(class_model) / "transformer"
    options = ("--decoding", "speculative", "--drafter", drafter, "--accept", "lantern", "--lantern-k", 4)
    finished = run("generate", "3", "-o", out / "3.png", "--model", class_model, *options)
    assert finished.code == 0, finished.stderr
    speculation = json.loads(finished.stdout)["speculation"]
    assert (
        speculation["draft_passes"] > 0
        and speculation["rule"] == "LanternRule"
        and not speculation["lossless"]
    )


def test_plain_decoding_says_so(run, model, out) -> None:
    finished = run("generate", "cat", "-o", out / "cat.png", "--model", model)
    report = json.loads(finished.stdout)
    assert (report["decoding"], report["speculation"], report["plain_seconds"]) == ("plain", None, None)


def test_the_model_s_own_drafter_is_used_where_it_is_faster(run, tmp_path, home, out, monkeypatch) -> None:
    """Measured once: the second time what was remembered counts, whatever a measurement would say."""
    from tests.tiny import save_tiny_pipeline

    folder = save_tiny_pipeline(tmp_path / "model", seed=0)
    vistok.load(folder).transformer.save_pretrained(folder / "drafter")

    def decoding_of() -> str:
        finished = run("generate", "cat", "-o", out / "cat.png", "--model", folder)
        assert finished.code == 0, finished.stderr
        return json.loads(finished.stdout)["decoding"]

    for is_faster, expected in ((True, "speculative"), (False, "plain")):
        monkeypatch.setattr(speculation, "is_faster", lambda one, other, answer=is_faster: answer)
        assert decoding_of() == expected
        monkeypatch.setattr(speculation, "is_faster", None)  # measuring again would fail
        assert decoding_of() == expected
        (home / "speculation.json").unlink()


def test_a_home_that_cannot_be_used_is_no_obstacle(run, tmp_path, out, monkeypatch) -> None:
    from tests.tiny import save_tiny_pipeline

    folder = save_tiny_pipeline(tmp_path / "model", seed=0)
    vistok.load(folder).transformer.save_pretrained(folder / "drafter")
    monkeypatch.setattr(speculation, "is_faster", lambda one, other: False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path / "file" / "home"))
    assert run("generate", "cat", "-o", out / "cat.png", "--model", folder).code == 0
    (tmp_path / "home2").mkdir()
    (tmp_path / "home2" / "speculation.json").write_text("{damaged")
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path / "home2"))
    assert run("generate", "cat", "-o", out / "cat.png", "--model", folder).code == 0


def test_the_faster_of_two_calls_is_found() -> None:
    import time

    assert speculation.is_faster(lambda: None, lambda: time.sleep(0.01))
    assert not speculation.is_faster(lambda: time.sleep(0.01), lambda: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--decoding", "fast"), ["unknown decoding 'fast'", "auto, plain, speculative"]),
        (("--drafter", "jacobi"), ["need --decoding speculative"]),
        (("--decoding", "speculative"), ["comes without a drafter", "--drafter"]),
        (("--decoding", "speculative", "--drafter", "jacobi", "--lantern-k", 3), ["of the rule 'lantern'"]),
        (("--decoding", "speculative", "--drafter", "neighbours"), ["need tokens on a grid"]),
        (
            ("--decoding", "speculative", "--drafter", "jacobi", "--watermark", "key"),
            ["does not support", "watermark"],
        ),
    ],
)
def test_bad_requests(run, model, out, options, words) -> None:
    finished = run("generate", "cat", "-o", out / "cat.png", "--model", model, *options)
    assert_refused(finished, *words)
    assert not (out / "cat.png").exists()
