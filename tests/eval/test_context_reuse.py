"""The measurement of context reuse at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.generators.test_any_order import make, make_masked
from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.masked import generate_masked
from vistok.decoding.streams import ImageStreams
from vistok.eval.context_reuse import Point, changed_share, divergence, load_masked, main, measure
from vistok.pipelines.settings import MaskedSettings

SETTINGS = MaskedSettings(num_inference_steps=9, choice_temperature=1.0, guidance_scale=1.5)


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    exact, other = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    expected = 0.2 * torch.tensor(0.4).log() + 0.8 * torch.tensor(1.6).log()
    shifted = exact.log() + 3.0  # logits need not be normalised
    assert float(divergence(shifted, other.log())) == pytest.approx(float(expected), abs=1e-6)
    assert float(divergence(shifted, exact.log())) == pytest.approx(0.0, abs=1e-6)


def test_share_of_changed_tokens() -> None:
    assert changed_share(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 0, 3, 0]])) == 0.5


@pytest.fixture(scope="module")
def points() -> list[Point]:
    schedules = (ContextReuse(2, warm_up=9), ContextReuse(2, warm_up=1), ContextReuse(4, warm_up=1))
    return measure(make_masked(), SETTINGS, schedules, num_images=60, timed_batch=2, repeats=1)


def test_full_evaluations_have_no_error(points: list[Point]) -> None:
    for point in points[:2]:
        assert (point.changed, point.divergence, point.stale, point.evaluated) == (0.0, None, None, 1.0)
    assert (points[0].period, points[0].speed_up) == (1, 1.0)
    assert all(point.seconds > 0 for point in points)


def test_the_error_grows_with_the_period(points: list[Point]) -> None:
    often, seldom = points[2:]
    assert often.divergence is not None and often.stale is not None and seldom.divergence is not None
    assert 1e-6 < often.divergence < seldom.divergence
    assert (
        often.divergence < often.stale
    )  # cheap logits are nearer to full ones than those of the step before
    assert 0 < often.changed < 1
    assert seldom.evaluated < 1


def test_share_of_evaluated_positions(points: list[Point]) -> None:
    """With 9 tokens and 9 steps, undecided before the steps: 9, 8, 7, 6, ...; full are 0, 1, 3, 5, 7."""
    model, canvas = make_masked(), []
    generate_masked(
        model,
        torch.tensor([0]),
        streams=ImageStreams.from_seeds([0]),
        sampling=SETTINGS.sampling,
        on_step=lambda step, indices: canvas.append(int((indices == model.mask_token_id).sum())),
    )
    left = [9, *canvas]  # undecided before each step
    shares = [
        1.0,
        1.0,
        (1 + left[1]) / 10,
        1.0,
        (1 + left[3]) / 10,
        1.0,
        (1 + left[5]) / 10,
        1.0,
        (1 + left[7]) / 10,
    ]
    assert points[2].evaluated == pytest.approx(sum(shares) / 9)


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    make_masked().save_pretrained(tmp_path / "model")
    small = ["--num-steps", "3", "5", "--periods", "2", "--warm-ups", "0", "1", "--num-images", "4"]
    main(
        [str(tmp_path / "model"), "-o", str(tmp_path / "out"), *small, "--timed-batch", "2", "--repeats", "1"]
    )
    report: Any = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "context-reuse.json").read_text()) == report
    rows = [(point["num_steps"], point["period"], point["warm_up"]) for point in report["points"]]
    assert rows == [(3, 1, 0), (3, 2, 0), (3, 2, 1), (5, 1, 0), (5, 2, 0), (5, 2, 1)]
    assert set(report["other_seed"]) == {"3", "5"}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| 3 | all full |" in page and "| 5 | 2 | 1 |" in page
    assert (tmp_path / "out" / "context-reuse.png").stat().st_size > 5000


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a AnyOrderAR, which is no masked generator"):
        load_masked(str(tmp_path))
