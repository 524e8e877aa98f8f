"""The diffusion head: chains against lists, diffusers and closed forms; loss; precision; bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vistok.models.heads.diffusion import Denoiser, DiffusionHead, full_chain, spread_timesteps

DISA = json.loads((Path(__file__).parents[2] / "goldens" / "mar" / "disa_schedule.json").read_text())
WIDTH = 0.5  # standard deviation of the tokens that `ideal` knows


def draws(shape: tuple[int, ...], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda dtype: torch.randn(shape, generator=generator, dtype=dtype)


def ideal(noisy: Tensor, time: float) -> Tensor:
    """The best prediction for normal tokens with a deviation of `WIDTH`, with the smaller variance."""
    kept = float(full_chain().alpha_bars[int(time)])
    noise = noisy * math.sqrt(1 - kept) / (kept * WIDTH**2 + 1 - kept)
    return torch.cat([noise, torch.full_like(noise, -1.0)], dim=-1)


def test_chains_are_spread_as_published() -> None:
    assert spread_timesteps([8]) == (0, 143, 285, 428, 571, 714, 856, 999)
    assert spread_timesteps([100])[:8] == (0, 10, 20, 30, 40, 50, 61, 71)
    assert spread_timesteps([100])[-2:] == (989, 999)
    assert spread_timesteps([1000]) == tuple(range(1000))
    assert spread_timesteps([3, 0, 2]) == (0, 166, 333, 667, 999)  # sections of 334, 333 and 333


@pytest.mark.parametrize("count", DISA["timestep_lists_clipped_950"])
def test_clipped_chains_are_the_published_ones(count: str) -> None:
    chain = DiffusionHead(last_timestep=950).chain(int(count))
    assert chain.timesteps.tolist() == DISA["timestep_lists_clipped_950"][count]


def test_the_full_chain_is_the_cosine_schedule() -> None:
    chain = full_chain()
    assert float(chain.alpha_bars[-1]) == pytest.approx(2.43e-9, rel=1e-3)
    assert float(chain.alpha_bars[950]) == pytest.approx(5.8e-3, rel=1e-2)
    assert float(chain.betas.max()) == pytest.approx(0.999, abs=1e-12)


@pytest.mark.parametrize("index", [1, 9, 25, 48])
def test_a_reverse_step_is_that_of_diffusers(index: int) -> None:
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    chain = DiffusionHead().chain(50)
    assert scheduler.timesteps.tolist() == chain.timesteps.tolist()[::-1]
    state, prediction = draws((6, 3))(torch.float32), draws((6, 6), seed=1)(torch.float32)
    timestep = int(chain.timesteps[index])
    expected = scheduler.step(prediction, timestep, state, generator=torch.Generator().manual_seed(2))
    step = chain.reverse(prediction, state, index)
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    actual = step.mean + (step.log_variance / 2).exp() * noise
    torch.testing.assert_close(actual, expected.prev_sample, atol=0, rtol=1e-4)


@pytest.mark.parametrize("head", [DiffusionHead(), DiffusionHead(last_timestep=950)])
def test_the_ideal_network_draws_from_the_distribution_of_the_tokens(head: DiffusionHead) -> None:
    tokens = head.sample(ideal, draws((1, 5000, 1)), num_inference_steps=400)
    assert float(tokens.std()) == pytest.approx(WIDTH, rel=0.03)
    assert abs(float(tokens.mean())) < 0.03
    assert tokens.dtype == torch.float32


def test_temperature_scales_the_noise_of_the_steps_and_not_the_start() -> None:
    widths = [
        float(DiffusionHead(temperature=t).sample(ideal, draws((1, 5000, 1)), num_inference_steps=50).std())
        for t in (0.5, 1.0)
    ]
    assert widths[0] < 0.8 * widths[1]
    starts: list[Tensor] = []

    def watched(noisy: Tensor, time: float) -> Tensor:
        starts.append(noisy)
        return ideal(noisy, time)

    DiffusionHead(temperature=0.0).sample(watched, draws((1, 8, 2)), num_inference_steps=5)
    assert torch.equal(starts[0], draws((1, 8, 2))(torch.float32))


def test_a_trajectory_tells_the_variances_along_the_way() -> None:
    head, chain = DiffusionHead(temperature=0.5), DiffusionHead().chain(7)
    trajectory = head.trajectory(ideal, draws((1, 4, 2)), num_inference_steps=7)
    expected = chain.posterior_log_variances / 2  # `ideal` always says -1: the lower bound
    torch.testing.assert_close(
        trajectory.log_std_sum, torch.full((1, 4, 2), float(expected[1:].sum())), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(trajectory.std, torch.full((1, 4, 2), 0.5 * float(expected[0].exp())))
    again = head.sample(ideal, draws((1, 4, 2)), num_inference_steps=7)
    assert torch.equal(trajectory.mean, again)


def test_noise_is_drawn_for_the_start_and_all_steps_but_the_last() -> None:
    asked: list[torch.dtype] = []
    times: list[float] = []

    def draw(dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return torch.zeros(1, 1, 2, dtype=dtype)

    def predict(noisy: Tensor, time: float) -> Tensor:
        times.append(time)
        return ideal(noisy, time)

    DiffusionHead().sample(predict, draw, num_inference_steps=8)
    assert asked == [torch.float32] * 8
    assert times == [999, 856, 714, 571, 428, 285, 143, 0]


def test_the_variational_term_is_the_divergence_in_bits() -> None:
    head, chain = DiffusionHead(), full_chain()
    clean, noise = draws((50, 3))(torch.float32), draws((50, 3), seed=1)(torch.float32)
    prediction = draws((50, 6), seed=2)(torch.float32)
    times = torch.randint(1, 900, (50,), generator=torch.Generator().manual_seed(3))
    terms = head.loss_terms(prediction, clean, noise, times)
    noised = head.noised(clean, noise, times)
    first, second = chain.posterior(clean, noised, times), chain.reverse(prediction, noised, times)
    exact = kl_divergence(
        *(Normal(one.mean.double(), (one.log_variance.double() / 2).exp()) for one in (first, second))
    )
    torch.testing.assert_close(
        terms.variational.double(), exact.mean(dim=1) / math.log(2), rtol=2e-3, atol=1e-5
    )
    torch.testing.assert_close(terms.mse, (noise - prediction[:, :3]).square().mean(dim=1))
    torch.testing.assert_close(
        head.loss(prediction, clean, noise, times), terms.mse + terms.variational, rtol=0, atol=0
    )


def test_the_first_timestep_has_the_likelihood_of_a_bin_instead() -> None:
    """With both edges, by the exact distribution function; the released one is an approximation."""
    head, times = DiffusionHead(), torch.zeros(3, dtype=torch.int64)
    clean = torch.tensor([[0.2], [1.0], [-1.0]])
    noise = torch.tensor([[0.5], [0.1], [-0.3]])
    prediction = torch.cat([noise, torch.zeros(3, 1)], dim=1)
    step = full_chain().reverse(prediction, head.noised(clean, noise, times), times)
    normal = Normal(step.mean, (step.log_variance / 2).exp())
    upper, lower = normal.cdf(clean + 1 / 255), normal.cdf(clean - 1 / 255)
    exact = torch.stack([upper[0] - lower[0], 1 - lower[1], upper[2]])
    bits = head.loss_terms(prediction, clean, noise, times).variational
    torch.testing.assert_close(bits, -exact[:, 0].log2(), rtol=0, atol=2e-2)


def test_the_variational_term_does_not_teach_the_noise() -> None:
    prediction = torch.zeros(4, 6, requires_grad=True)
    clean, noise = draws((4, 3))(torch.float32), draws((4, 3), seed=1)(torch.float32)
    terms = DiffusionHead().loss_terms(prediction, clean, noise, torch.tensor([0, 1, 500, 999]))
    terms.variational.sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[:, :3].any() and prediction.grad[:, 3:].any()


def make_denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(latent_dim=3, condition_dim=5, dim=16, depth=2)


def test_every_parameter_of_the_network_gets_a_gradient_even_after_sampling() -> None:
    head, network = DiffusionHead(), make_denoiser()
    conditions = torch.randn(1, 4, 5)

    def predict(noisy: Tensor, time: float) -> Tensor:
        return network(noisy, torch.full(noisy.shape[:2], int(time)), conditions)

    full_chain.cache_clear()
    with torch.inference_mode():  # what is kept of a chain must not spoil the training after it
        head.sample(predict, draws((1, 4, 3)), num_inference_steps=4)
    clean, noise, times = torch.randn(1, 4, 3), torch.randn(1, 4, 3), torch.tensor([[0, 10, 500, 999]])
    prediction = network(head.noised(clean, noise, times), times, conditions)
    head.loss(prediction, clean, noise, times).mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.inference_mode()
def test_half_precision_keeps_the_digits_that_the_noisiest_step_needs() -> None:
    """Inputs that bfloat16 cannot tell apart have different outputs, by the slope of the network."""
    network = make_denoiser().to(torch.bfloat16)
    noisy, times, conditions = torch.ones(1, 3), torch.tensor([999]), torch.randn(1, 5)
    outputs = [network(noisy + shift, times, conditions) for shift in (0.0, 1e-4)]
    assert torch.equal((noisy + 1e-4).bfloat16(), noisy.bfloat16())
    assert all(output.dtype == torch.float32 for output in outputs)
    wide = make_denoiser()
    wide.load_state_dict(network.state_dict())
    slope = (wide(noisy + 1e-4, times, conditions) - wide(noisy, times, conditions)) / 1e-4
    measured = (outputs[1] - outputs[0]) / 1e-4
    assert float((measured - slope).abs().max()) < 0.5 * float(slope.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(noisy, times, conditions).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"last_timestep": 1000}, r"last_timestep must be in 1\.\.999, got 1000"),
        ({"shares": (0, 0)}, "shares must be at least 0, and not all 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionHead(**options)


@pytest.mark.parametrize(
    ("shares", "count", "message"),
    [
        ((1,), 1, "a chain needs at least 2 denoising steps.*got 1"),
        ((1,), 0, "a chain needs at least 2 denoising steps.*got 0"),
        ((1,), 1001, "1000 timesteps cannot give 1001 denoising steps"),
        ((1, 0), 501, "500 timesteps cannot give 501 denoising steps"),
        ((2, 1), 8, r"8 denoising steps cannot be shared out as \(2, 1\)"),
    ],
)
def test_chains_that_cannot_be_are_refused(shares: tuple[int, ...], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionHead(shares=shares).chain(count)
