"""Schedules of denoising steps against the lists that DiSA's code gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vistok.decoding.step_schedules import SCHEDULES, annealed_steps, steps_of_each
from vistok.models.heads.diffusion import DiffusionHead

DISA = json.loads((Path(__file__).parents[1] / "goldens" / "mar" / "disa_schedule.json").read_text())
CLIPPED = DiffusionHead(last_timestep=950)


@pytest.mark.parametrize("case", DISA["mar"], ids=lambda case: f"{case['num_iter']}-{case['strategy']}")
def test_schedules_of_mar_are_the_published_ones(case: dict) -> None:
    steps = annealed_steps(case["num_iter"], case["upper"], case["lower"], case["strategy"])
    assert list(steps) == case["nominal_steps"]
    actual = [len(CLIPPED.chain(count)) for count in steps]
    assert actual == case["actual_steps"] and sum(actual) == case["total_actual"]


@pytest.mark.parametrize("case", DISA["xar"], ids=lambda case: f"{case['upper']}-{case['lower']}")
def test_schedules_of_xar_are_the_published_ones(case: dict) -> None:
    cells = case["steps_per_cell"]
    assert list(annealed_steps(len(cells), case["upper"], case["lower"])) == cells


def test_all_schedules_are_among_the_published_lists() -> None:
    assert {case["strategy"] for case in DISA["mar"]} == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_most_to_least(schedule: str) -> None:
    for num_steps in (2, 3, 7):
        steps = annealed_steps(num_steps, 9, 3, schedule)
        assert len(steps) == num_steps and steps[-1] == 3
        assert steps[0] == (3 if schedule == "constant" else 9)
        assert list(steps) == sorted(steps, reverse=True)
    assert annealed_steps(1, 9, 3, schedule) == ((3,) if schedule == "constant" else (9,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 50, 5), "an order has at least one step, got 0"),
        ((4, 5, 50), "got most 5, least 50"),
        ((4, 5, 0), "got most 5, least 0"),
        (
            (4, 50, 5, "quadratic"),
            "unknown schedule 'quadratic'; choose one of linear, cosine, two-stage, constant",
        ),
    ],
)
def test_impossible_schedules_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annealed_steps(*arguments)


def test_one_number_serves_all_steps_and_several_must_be_one_for_each() -> None:
    assert steps_of_each(7, 3) == [7, 7, 7]
    assert steps_of_each((3, 2, 1), 3) == [3, 2, 1]
    with pytest.raises(ValueError, match=r"one integer or 3 of them, one per step; got \[3, 2\]"):
        steps_of_each([3, 2], 3)
