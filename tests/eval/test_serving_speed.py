"""The benchmark of serving at tiny sizes, and that all ways of it serve the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.sampling import SamplingParams
from vistok.eval import serving_speed
from vistok.eval.random_weights import randomize
from vistok.eval.serving_speed import (
    Batches,
    Continuous,
    Subject,
    check_parity,
    draw_together,
    main,
    play,
    poisson_arrivals,
)
from vistok.models.generators.llamagen import LlamaGenClass


def make_subject(scale: float = 2.0) -> Subject:
    torch.manual_seed(0)
    model = LlamaGenClass(
        codebook_size=20, num_tokens=16, num_classes=5, dim=16, depth=2, num_heads=2, mlp_dim=24
    )
    labels = [torch.tensor([label]) for label in range(5)]
    return Subject("tiny", randomize(model).eval(), labels, SamplingParams(top_k=5), ConstantGuidance(scale))


def test_requests_are_the_same_however_many_and_differ_in_length() -> None:
    subject = make_subject()
    requests = subject.requests(20, "mixed")
    assert {request.num_tokens for request in requests} == {4, 8, 16}
    assert [request.num_tokens for request in subject.requests(7, "mixed")] == [
        request.num_tokens for request in requests[:7]
    ]
    assert {request.num_tokens for request in subject.requests(7, "all")} == {16}
    assert [request.seed for request in requests] == list(range(20))
    assert [int(request.condition) for request in requests[:6]] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_all_ways_draw_the_same_images(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject(scale)
    requests = subject.requests(5, "mixed")
    alone = [draw_together(subject.model, [request]) for request in requests]
    drawn = []

    def remember(model, requests):
        drawn.append(draw_together(model, requests))
        return drawn[-1]

    monkeypatch.setattr(serving_speed, "draw_together", remember)
    batches = Batches(subject.model, requests, 3, waits=True)
    play(batches, [0.0] * 5)
    assert [len(tokens) for tokens in drawn] == [3, 2]
    together = [tokens[row] for tokens in drawn for row in range(len(tokens))]
    continuous = Continuous(subject, requests, 3)
    play(continuous, [0.0] * 5)
    served = [ticket.result() for ticket in sorted(continuous.numbers, key=lambda t: t.request_id)]
    for expected, one, other in zip(alone, together, served, strict=True):
        length = int(expected.token_counts)
        assert torch.equal(one.data[0, :length], expected.data[0])
        assert torch.equal(other.data, expected.data)


def test_batches_wait_for_a_full_one_or_not() -> None:
    subject = make_subject()
    for waits, expected in ((True, [None, [0, 1], [2]]), (False, [[0], [1], [2]])):
        way = Batches(subject.model, subject.requests(3, "all"), 2, waits=waits)
        done = []
        for number in range(3):
            way.submit(number)
            done.append(way.work(more_will_come=number < 2))
        assert done == expected
        assert way.work(more_will_come=False) is None


def test_times_count_from_arrivals() -> None:
    class Instant:
        """Serves one request at a time, at once."""

        def __init__(self) -> None:
            self.waiting: list[int] = []

        def submit(self, number: int) -> None:
            self.waiting.append(number)

        def work(self, more_will_come: bool) -> list[int] | None:
            return [self.waiting.pop(0)] if self.waiting else None

    arrivals = [0.0, 0.05, 0.06]
    ends = play(Instant(), arrivals)
    assert all(0 <= end - arrival < 0.5 for end, arrival in zip(ends, arrivals, strict=True))


def test_arrivals_have_the_rate_asked_for() -> None:
    arrivals = torch.tensor(poisson_arrivals(2001, 4.0), dtype=torch.float64)
    gaps = arrivals.diff()
    assert arrivals[0] == 0 and bool((gaps > 0).all())
    assert gaps.mean().item() == pytest.approx(0.25, rel=0.1)
    assert gaps.std().item() == pytest.approx(0.25, rel=0.1)  # of an exponential distribution
    assert poisson_arrivals(5, 4.0) == arrivals[:5].tolist()


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    check_parity(subject, num_slots=4)

    def wrong(indices, cache):
        """Other tokens where there is company."""
        return subject.model.feed((indices + (len(indices) > 2)) % 20, cache)

    other: Any = SimpleNamespace(feed=wrong)
    with pytest.raises(ValueError, match=r"tiny: image \d differs from token \d+ on"):
        check_parity(replace(subject, compiled=other), num_slots=4)


def test_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving_speed, "MODELS", {"tiny": make_subject})
    sizes = ["--images", "4", "--slots", "4", "--loads", "2", "--dtypes", "float32", "bfloat16"]
    main(["-o", str(tmp_path / "serving"), "--models", "tiny", *sizes])
    stored = json.loads((tmp_path / "serving" / "serving-speed.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    rows = [(run["dtype"], run["lengths"], run["way"]) for run in stored["runs"]]
    ways = ("full batches", "what waits", "continuous")
    assert rows == [(d, n, w) for d in ("float32", "bfloat16") for n in ("all", "mixed") for w in ways]
    page = (tmp_path / "serving" / "report.md").read_text()
    for run in stored["runs"]:
        assert run["requests_per_second"] == 2 * stored["capacities"][f"tiny {run['dtype']}"]
        assert 0 < run["mean_latency"] <= run["latency_95"] * 4
        figures = [f"{run[name]:.2f}" for name in ("images_per_second", "mean_latency", "latency_95")]
        assert f"| tiny | {run['dtype']} | {run['lengths']} | {run['way']} | 2 | " in page
        assert " | ".join(figures) in page
    assert stored["machine"] in page and "4 requests each" in page
