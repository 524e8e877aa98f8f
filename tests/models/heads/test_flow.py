"""The flow head: what it teaches, and that its integrators end where the flow does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok.models.heads.flow import Euler, EulerMaruyama, FlowHead, Integrator, logit_normal_times

CLEAN = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Draws:
    """Standard normal draws that remember what was asked for."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)
        self.dtypes: list[torch.dtype] = []

    def __call__(self, dtype: torch.dtype) -> Tensor:
        self.dtypes.append(dtype)
        return torch.randn(self.shape, generator=self.generator, dtype=dtype)


def test_times_fall_from_noise_to_data() -> None:
    assert Euler().times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    times = EulerMaruyama().times(3)
    assert times == pytest.approx([1.0, 0.52, 0.04, 0.0]) and times[-1] == 0


@pytest.mark.parametrize("num_steps", [5, 7])
def test_the_network_is_told_the_published_thousandths(num_steps: int) -> None:
    """Products of float32: in float64 one of each list would be smaller by 1."""
    published = {5: [1000, 760, 520, 280, 40], 7: [1000, 840, 680, 520, 360, 200, 40]}
    times = torch.tensor(EulerMaruyama().times(num_steps)[:-1], dtype=torch.float64)
    assert (times.float() * 1000).long().tolist() == published[num_steps]
    assert (times * 1000).long().tolist() != published[num_steps]


@pytest.mark.parametrize(
    ("integrator", "num_steps", "message"),
    [
        (EulerMaruyama(), 2, "at least 3 steps.*got 2; Euler takes fewer"),
        (EulerMaruyama(), 1, "at least 3 steps"),
        (Euler(), 0, "at least 1, got 0"),
    ],
)
def test_too_few_steps_are_refused(integrator: Integrator, num_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowHead(integrator).sample(lambda noisy, time: noisy, Draws(3, 4, 2), num_inference_steps=num_steps)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_euler_follows_straight_lines_exactly(num_steps: int) -> None:
    drawn = FlowHead(Euler()).sample(
        lambda noisy, time: (noisy - CLEAN) / time, Draws(3, 4, 2), num_inference_steps=num_steps
    )
    torch.testing.assert_close(drawn, CLEAN, atol=1e-12, rtol=0)


@pytest.mark.parametrize("integrator", [Euler(), EulerMaruyama()])
def test_the_samples_have_the_distribution_of_the_data(integrator: Integrator) -> None:
    mean, std = 1.5, 0.5

    def velocity(noisy: Tensor, time: float) -> Tensor:
        """Expected `noise - clean` at a noisy token, of normal data."""
        variance = (1 - time) ** 2 * std**2 + time**2
        covariance = time - (1 - time) * std**2
        return covariance / variance * (noisy - (1 - time) * mean) - mean

    drawn = FlowHead(integrator).sample(velocity, Draws(20_000, 1, 1), num_inference_steps=200)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)
    assert float(drawn.std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize("integrator", [Euler(), EulerMaruyama()])
def test_the_state_is_float64_whatever_the_network_gives(integrator: Integrator) -> None:
    states: list[Tensor] = []

    def velocity(noisy: Tensor, time: float) -> Tensor:
        states.append(noisy)
        return noisy.bfloat16()

    draws = Draws(3, 4, 2)
    drawn = FlowHead(integrator).sample(velocity, draws, num_inference_steps=5)
    assert {state.dtype for state in (*states, drawn)} == {torch.float64}
    steps_with_noise = 4 if isinstance(integrator, EulerMaruyama) else 0  # the last one takes none
    assert draws.dtypes == [torch.float32, *[torch.float64] * steps_with_noise]


def test_noised_tokens_have_a_time_each() -> None:
    clean, noise = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    times = torch.tensor([[0.0, 1.0, 0.25], [1.0, 0.5, 0.0]])
    noised = FlowHead().noised(clean, noise, times)
    assert torch.equal(noised[0, 0], clean[0, 0]) and torch.equal(noised[0, 1], noise[0, 1])
    torch.testing.assert_close(noised[1, 1], (clean[1, 1] + noise[1, 1]) / 2)
    torch.testing.assert_close(noised[0, 2], 0.75 * clean[0, 2] + 0.25 * noise[0, 2])


def test_the_loss_is_the_error_of_the_velocity_per_token() -> None:
    clean, noise, times = torch.randn(2, 3, 2), torch.randn(2, 3, 2), torch.rand(2, 3)
    prediction = noise - clean
    prediction[1, 2] += torch.tensor([1.0, 3.0])
    loss = FlowHead().loss(prediction, clean, noise, times)
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0, 0], [0, 0, 5]]), atol=1e-5, rtol=0)
    assert FlowHead().loss(prediction.bfloat16(), clean, noise, times).dtype == torch.float32


def test_training_times_are_logit_normal() -> None:
    times = logit_normal_times(torch.tensor([[0.0, 2.0], [-2.0, 30.0]]))
    assert times.dtype == torch.float32
    torch.testing.assert_close(times, torch.tensor([[0.5, 0.8807971], [0.1192029, 1.0]]))
