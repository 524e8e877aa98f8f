import pytest
import torch

from vistok.decoding.guidance import (
    ConstantGuidance,
    LinearGuidance,
    PowerCosineGuidance,
    StepsGuidance,
    apply_guidance,
)


def test_scale_one_gives_back_the_conditional_prediction():
    cond, uncond = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(apply_guidance(cond, uncond, 1.0), cond)
    torch.testing.assert_close(apply_guidance(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(apply_guidance(cond, uncond, 3.0), cond + 2 * (cond - uncond))


@pytest.mark.parametrize("schedule", [LinearGuidance(5.0), PowerCosineGuidance(5.0)])
def test_ramps_start_off_and_rise_towards_the_scale(schedule):
    scales = [schedule.at(step, 10) for step in range(10)]
    assert scales[0] == 1.0
    assert scales == sorted(scales)
    assert 4.0 < scales[-1] < 5.0


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_a_power_that_is_not_above_zero_is_refused(power):
    with pytest.raises(ValueError, match="guidance_power must be above 0"):
        PowerCosineGuidance(2.0, power)


def test_constant_is_constant():
    assert {ConstantGuidance(2.5).at(step, 4) for step in range(4)} == {2.5}


def test_steps_guidance_ends_after_its_steps():
    assert [StepsGuidance(2.5, 2).at(step, 4) for step in range(4)] == [2.5, 2.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="num_guided counts steps and must be at least 0, got -1"):
        StepsGuidance(2.5, -1)


@pytest.mark.parametrize("scale", [0.99, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make", [ConstantGuidance, LinearGuidance, PowerCosineGuidance, lambda s: StepsGuidance(s, 1)]
)
def test_scales_below_one_or_not_finite_are_refused(make, scale):
    with pytest.raises(ValueError, match="guidance_scale must be at least 1, which is off"):
        make(scale)
