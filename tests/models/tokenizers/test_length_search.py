"""What the search for the shortest good prefix promises, on any curve and with a decoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vistok.models.tokenizers.length_search import LengthChoice, psnr, shortest_prefixes

curves = st.integers(1, 70).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 40), min_size=n, max_size=n), min_size=1, max_size=4)
)  # quality of the prefixes of each image, of 1, 2, ... tokens


patient = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure


class Measurements:
    """Looks qualities up in curves and remembers what it was asked."""

    def __init__(self, curves: list[list[float]], target: float) -> None:
        self.qualities = torch.tensor(curves, dtype=torch.float64)  # [b n]
        self.target = target
        self.asked: list[Tensor] = []

    def __call__(self, lengths: Tensor) -> Tensor:
        assert lengths.dtype == torch.int64
        self.asked.append(lengths.clone())
        return self.qualities.gather(1, lengths[:, None] - 1)[:, 0] >= self.target

    def search(self) -> LengthChoice:
        return shortest_prefixes(self, *self.qualities.shape)

    def measured(self, image: int) -> set[int]:
        return {int(lengths[image]) for lengths in self.asked}


@patient
@given(curves, st.floats(0, 41))
def test_the_choice_is_the_shortest_good_prefix_of_those_measured(curves, target):
    measurements = Measurements(curves, target)
    choice = measurements.search()
    n = len(curves[0])
    for image, curve in enumerate(curves):
        length, measured = int(choice.lengths[image]), measurements.measured(image)
        good = {one for one in measured if curve[one - 1] >= target}
        assert length == min(good, default=n)
        assert bool(choice.is_met[image]) == bool(good)
        assert length in measured
        if good and length > 1:
            assert length - 1 in measured and curve[length - 2] < target
    assert len(measurements.asked) <= math.ceil(math.log2(n + 1))


@patient
@given(curves, st.floats(0, 41))
def test_on_a_rising_curve_it_is_what_measuring_every_prefix_gives(curves, target):
    curves = [sorted(curve) for curve in curves]
    choice = Measurements(curves, target).search()
    for image, curve in enumerate(curves):
        good = [length for length, quality in enumerate(curve, start=1) if quality >= target]
        assert int(choice.lengths[image]) == (good[0] if good else len(curve))
        assert bool(choice.is_met[image]) == bool(good)


@patient
@given(curves, st.floats(0, 41), st.floats(0, 41))
def test_a_stricter_target_never_gives_a_shorter_prefix(curves, one, other):
    loose, strict = (Measurements(curves, target).search() for target in sorted((one, other)))
    assert (loose.lengths <= strict.lengths).all()
    assert (loose.is_met >= strict.is_met).all()


def test_images_do_not_influence_each_other():
    curves = torch.rand(5, 23, generator=torch.Generator().manual_seed(0)).tolist()
    together = Measurements(curves, 0.6).search().lengths.tolist()
    assert together == [int(Measurements([curve], 0.6).search().lengths) for curve in curves]


def test_a_batch_without_images_needs_no_measurement():
    choice = shortest_prefixes(lambda lengths: pytest.fail("measured"), 0, 8)
    assert choice.lengths.shape == (0,)


@patient
@given(st.integers(0, 255), st.integers(0, 255))
def test_psnr_is_that_of_the_saved_pictures(one, other):
    images, reconstructions = (torch.full((1, 3, 2, 2), value / 127.5 - 1) for value in (one, other))
    expected = math.inf if one == other else 20 * math.log10(255 / abs(one - other))
    assert psnr(reconstructions + 0.3 / 127.5, images).item() == pytest.approx(expected)
