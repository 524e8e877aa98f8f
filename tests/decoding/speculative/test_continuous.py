"""Continuous speculative decoding: the promised distribution, how far the released rule is off, the loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vistok import MAR
from vistok.decoding.guidance import LinearGuidance
from vistok.decoding.speculative.continuous import (
    MAX_TRIALS,
    AcceptRule,
    Decision,
    Draws,
    SpeculationParams,
    State,
    Verification,
    add_draft,
    commit,
    decide,
    generate_speculative,
    resample,
)
from vistok.decoding.streams import ImageStreams
from vistok.models.heads.diffusion import DiffusionHead, Trajectory

NUM_SAMPLES = 20_000
CRITICAL = 1.63 / math.sqrt(NUM_SAMPLES)  # of the Kolmogorov-Smirnov distance, at 1 %
GAUSSIANS = {  # means and deviations of draft and target, per channel
    "shifted": ([0.0], [1.0], [1.0], [1.0]),
    "narrower": ([0.3], [1.0], [0.0], [0.6]),
    "wider": ([0.0], [0.6], [0.3], [1.0]),
    "three channels": ([0.0, 0.2, -0.3], [1.0, 0.8, 1.2], [0.4, 0.0, -0.5], [0.9, 1.0, 1.1]),
}


def trajectory(mean: list[float], std: list[float], log_std_sum: float = 0.0, count: int = NUM_SAMPLES):
    """The same Gaussian for `count` tokens of one image, `[1 k c]`."""
    shape = (1, count, len(mean))
    return Trajectory(
        torch.tensor(mean).expand(shape), torch.tensor(std).expand(shape), torch.full(shape, log_std_sum)
    )


def decide_many(draft: Trajectory, target: Trajectory, rule: AcceptRule, seed: int = 0) -> Decision:
    """One decision for each of many tokens that are drawn from the draft."""
    _, count, channels = draft.mean.shape
    streams = ImageStreams.from_seeds([seed])
    tokens = draft.mean + draft.std * streams.normal(count, channels)
    draws = Draws.from_streams(streams, count, channels, torch.device("cpu"))
    return decide(tokens, draft, target, draws, rule)


def ks_distance(samples: Tensor, mean: float, std: float) -> float:
    """The largest difference between the distribution of `samples [k]` and a normal one."""
    expected = torch.distributions.Normal(mean, std).cdf(samples.double().sort().values)
    ranks = torch.arange(len(samples) + 1) / len(samples)
    return float(torch.maximum((ranks[1:] - expected).abs(), (ranks[:-1] - expected).abs()).max())


def distances_to_target(tokens: Tensor, target: Trajectory) -> list[float]:
    """Of every channel and, where there are several, of one mixture of them."""
    rows, mean, std = tokens[0].double(), target.mean[0, 0].double(), target.std[0, 0].double()
    directions = [*torch.eye(rows.shape[1], dtype=torch.float64)]
    if len(directions) > 1:
        directions.append(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    return [
        ks_distance(rows @ direction, float(mean @ direction), float((std * direction).norm()))
        for direction in directions
    ]


@pytest.mark.parametrize("case", GAUSSIANS)
def test_accepted_and_redrawn_tokens_follow_the_target(case: str) -> None:
    """T = 1, tokens that are draws of the draft, decided one by one: there the method promises it."""
    draft_mean, draft_std, target_mean, target_std = GAUSSIANS[case]
    draft, target = trajectory(draft_mean, draft_std), trajectory(target_mean, target_std)
    decision = decide_many(draft, target, AcceptRule(inner_temperature=1.0))
    assert 0.2 < float(decision.is_accepted.float().mean()) < 0.95  # both kinds are many
    assert max(distances_to_target(decision.tokens, target)) < CRITICAL


@pytest.mark.parametrize("broken", ["plain target", "no correction", "draft's own", "wide acceptance"])
def test_the_statistic_finds_broken_rules(broken: str) -> None:
    draft, target = trajectory(*GAUSSIANS["narrower"][:2]), trajectory(*GAUSSIANS["narrower"][2:])
    rule = AcceptRule(inner_temperature=2.0 if broken == "wide acceptance" else 1.0)
    decision = decide_many(draft, target, rule)
    fresh = target.mean + target.std * ImageStreams.from_seeds([1]).normal(NUM_SAMPLES, 1)
    tokens = {
        "plain target": torch.where(decision.is_accepted[..., None], decision.tokens, fresh),
        "no correction": decision.tokens[:, decision.is_accepted[0]],
        "draft's own": draft.mean + draft.std * ImageStreams.from_seeds([0]).normal(NUM_SAMPLES, 1),
        "wide acceptance": decision.tokens,
    }[broken]
    assert max(distances_to_target(tokens, target)) > 2 * CRITICAL


@pytest.mark.parametrize(
    ("distance", "of_draft", "of_released"),
    [
        (0.25, 0.099, 0.099),
        (0.5, 0.197, 0.197),
        (1.0, 0.383, 0.382),
        (2.0, 0.683, 0.681),
        (4.0, 0.954, 0.950),
        (10.0, 1.000, 0.972),
    ],
)
def test_the_table_of_deviations_is_right(distance: float, of_draft: float, of_released: float) -> None:
    """The table of the module, by integration over a grid, with the rule itself."""
    assert total_variation(distance, None) == pytest.approx(of_draft, abs=1e-3)
    assert total_variation(distance, AcceptRule(42.0)) == pytest.approx(of_released, abs=1e-3)
    assert total_variation(distance, AcceptRule(1.0)) == pytest.approx(0, abs=1e-3)


def total_variation(distance: float, rule: AcceptRule | None) -> float:
    """Between the target and what a rule makes of the draft; `None` keeps the draft's tokens."""
    grid = torch.linspace(-15, 25, 100_001, dtype=torch.float64)
    width = float(grid[1] - grid[0])
    draft, target = (trajectory([mean], [1.0], count=len(grid)) for mean in (0.0, distance))
    density, wanted = (torch.distributions.Normal(mean, 1.0).log_prob(grid).exp() for mean in (0.0, distance))
    if rule is not None:
        tokens = grid[None, :, None]
        accepted = density * rule.log_ratio(tokens, draft, target)[0].exp().clamp_max(1)
        residual = wanted * rule.residual_share(tokens, draft, target)[0]
        missing = 1 - float(accepted.sum()) * width
        density = accepted + missing * residual / (residual.sum() * width)
    return float((density - wanted).abs().sum()) * width / 2


def test_the_released_rule_keeps_the_draft_where_the_exact_one_does_not() -> None:
    draft, target = trajectory([0.0], [1.0]), trajectory([2.0], [1.0])
    released, exact = (decide_many(draft, target, AcceptRule(t)) for t in (42.0, 1.0))
    assert float(released.is_accepted.float().mean()) > 0.99 > 0.4 > float(exact.is_accepted.float().mean())
    assert ks_distance(released.tokens.flatten(), 2.0, 1.0) > 0.6
    assert ks_distance(exact.tokens.flatten(), 2.0, 1.0) < CRITICAL


def test_variances_along_the_chains_bound_acceptance_and_residual() -> None:
    draft, target = trajectory([0.0], [1.0], 0.2, count=4), trajectory([0.5], [1.0], 0.5, count=4)
    rule, tokens = AcceptRule(1.0), torch.zeros(1, 4, 1)
    torch.testing.assert_close(rule.log_bound(draft, target), torch.full((1, 4), 0.3).double())
    unbounded = rule.log_ratio(tokens, replace(draft, log_std_sum=target.log_std_sum), target)
    torch.testing.assert_close(
        rule.log_ratio(tokens, draft, target) - unbounded, torch.full((1, 4), 0.3).double()
    )
    share = rule.residual_share(tokens + 1, draft, target)
    expected = 1 - math.exp(-0.5 + 0.125 - 0.3)
    torch.testing.assert_close(share, torch.full((1, 4), expected).double())
    assert not rule.residual_share(
        tokens - 5, draft, target
    ).any()  # there the draft has more than the target


def test_narrow_gaussians_of_many_channels_do_not_underflow() -> None:
    """Densities of 16 channels with a deviation of 0.006 do not fit into float32."""
    draft, target = (
        trajectory([mean] * 16, [std] * 16, count=50) for mean, std in ((0.0, 0.0062), (0.003, 0.0063))
    )
    decision = decide_many(draft, target, AcceptRule(1.0))
    assert decision.log_ratio.isfinite().all() and decision.tokens.isfinite().all()
    assert 0 < int(decision.is_accepted.sum()) < 50


def make_draws(trials: list[list[bool]]) -> Draws:
    """Trials `[t][k]` that succeed or fail whatever is proposed; proposals are the numbers of the trials."""
    success = torch.tensor(trials)
    normals = torch.arange(1.0, len(trials) + 1)[None, :, None, None].expand(1, -1, success.shape[1], 1)
    return Draws(torch.ones(1, success.shape[1]), normals, torch.where(success, 0.0, 1.0)[None])


def test_the_last_success_counts_until_every_token_has_had_one() -> None:
    draft, target = trajectory([100.0], [1.0], count=3), trajectory([0.0], [1.0], count=3)
    trials = [[True, False, False], [False, True, False], [True, False, True], [True, True, True]]
    resampled = resample(draft, target, make_draws(trials), AcceptRule())
    assert resampled.num_trials.tolist() == [3]
    assert resampled.tokens.flatten().tolist() == [3.0, 2.0, 3.0]


def test_a_token_without_a_success_becomes_zero() -> None:
    draft, target = trajectory([100.0], [1.0], count=2), trajectory([0.0], [1.0], count=2)
    draws = make_draws([[True, False], [True, False], [False, False]])
    resampled = resample(draft, target, draws, AcceptRule())
    assert resampled.num_trials.tolist() == [3]
    assert resampled.tokens.flatten().tolist() == [2.0, 0.0]
    decision = decide(torch.full((1, 2, 1), 99.0), draft, target, draws, AcceptRule(1.0))
    assert decision.tokens.flatten().tolist() == [2.0, 0.0]


def test_equal_models_accept_everything() -> None:
    both = trajectory([0.3, -1.0], [0.5, 0.1], count=40)
    decision = decide_many(both, both, AcceptRule(1.0))
    assert decision.is_accepted.all() and not decision.resampled.tokens.any()


@pytest.fixture(scope="module")
def models() -> tuple[MAR, MAR]:
    """A draft and a target."""
    made = []
    for seed, dim in ((0, 16), (1, 24)):
        torch.manual_seed(seed)
        model = MAR(
            latent_dim=3,
            latent_scale=0.5,
            num_tokens=16,
            layout="4x4",
            num_classes=5,
            num_buffer_tokens=2,
            dim=dim,
            encoder_depth=1,
            decoder_depth=1,
            num_heads=2,
            mlp_dim=32,
            denoiser_dim=dim,
            denoiser_depth=1,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        made.append(model.eval())
    return made[0], made[1]


LABELS, SEEDS = torch.tensor([3, 1, 4]), [5, 6, 7]
STEPS = 8
MIXED = SpeculationParams(num_draft=3, prefill=0.2, inner_temperature=2000.0)  # random models are far apart


def generate(draft: MAR, target: MAR, labels: Tensor = LABELS, seeds: list[int] = SEEDS, **options):
    settings = {"num_steps": STEPS, "num_inference_steps": 4, "head": DiffusionHead(last_timestep=950)}
    streams = ImageStreams.from_seeds(seeds)
    return generate_speculative(
        draft, target, labels, streams=streams, **settings | {"speculation": MIXED} | options
    )


def test_a_run_decides_and_verifies_every_position_once(models) -> None:
    verified: list[Verification] = []
    canvases: list[Tensor] = []
    tokens = generate(
        *models,
        guidance=LinearGuidance(2.0),
        on_verify=verified.append,
        on_step=lambda step, latents: canvases.append(latents),
    )
    assert [one.step for one in verified] == [3, 6, 7]  # 0 and 1 are filled in by the target
    positions = torch.cat([one.positions for one in verified], dim=1)
    assert all(len(row.unique()) == len(row) for row in positions)
    prefilled = (canvases[1] != 0).any(dim=-1).sum(dim=1)
    assert (prefilled + positions.shape[1] == 16).all()
    rates = torch.cat([one.decision.is_accepted for one in verified], dim=1).float()
    assert 0 < float(rates.mean()) < 1
    assert tokens.data.dtype == torch.float32 and tokens.data.isfinite().all()
    assert torch.equal(tokens.data, canvases[-1])


@pytest.mark.parametrize("guidance", [None, LinearGuidance(2.0)])
def test_an_image_does_not_depend_on_its_neighbours(models, guidance) -> None:
    together = generate(*models, guidance=guidance).data
    for image, seed in enumerate(SEEDS):
        alone = generate(*models, LABELS[image : image + 1], [seed], guidance=guidance).data
        torch.testing.assert_close(together[image : image + 1], alone, atol=1e-3, rtol=1e-3)


def test_a_target_that_drafts_for_itself_draws_its_own_tokens(models) -> None:
    """Verified after every step, draft and target see the same, so that all is accepted."""
    _, target = models
    rates: list[Tensor] = []
    drafted = generate(
        target,
        target,
        speculation=SpeculationParams(num_draft=1, prefill=0.0, inner_temperature=1.0),
        on_verify=lambda one: rates.append(one.decision.is_accepted),
    )
    assert len(rates) == STEPS - 1 and all(rate.all() for rate in rates)
    own = generate(target, target, speculation=SpeculationParams(prefill=1.0), on_verify=rates.append)
    assert len(rates) == STEPS - 1
    torch.testing.assert_close(drafted.data, own.data)


def test_draft_and_target_walk_with_the_same_noise(models) -> None:
    """The released token is the mean of the draft; a rejected one is near the mean of the target."""
    seen: list[Verification] = []
    generate(*models, on_verify=seen.append)
    for one in seen:
        rejected = ~one.decision.is_accepted
        replaced = one.decision.tokens[rejected]
        distance = (replaced - one.target.mean[rejected]).abs() / one.target.std[rejected]
        assert float(distance.max()) < 6
        kept = one.decision.tokens[one.decision.is_accepted]
        assert torch.equal(kept, one.draft.mean[one.decision.is_accepted])


def test_states_are_values(models) -> None:
    empty = State.empty(models[0], 2)
    positions = torch.tensor([[3, 1], [0, 2]])
    drawn = Trajectory(torch.ones(2, 2, 3), torch.full((2, 2, 3), 2.0), torch.full((2, 2, 3), 3.0))
    drafted = add_draft(empty, positions, drawn)
    assert (
        drafted.num_verified == 0
        and drafted.latents[0, 3].eq(1).all()
        and drafted.drafted.std[1, 2].eq(2).all()
    )
    done = commit(drafted, positions, torch.full((2, 2, 3), 5.0))
    assert done.num_verified == 2 and done.latents[0, 1].eq(5).all() and done.latents[0, 0].eq(0).all()
    assert not empty.latents.any() and empty.num_verified == 0


def test_draws_are_as_many_whatever_happens() -> None:
    draws = Draws.from_streams(ImageStreams.from_seeds([1, 2]), 5, 3, torch.device("cpu"))
    assert draws.uniforms.shape == (2, 5)
    assert draws.trial_normals.shape == (2, MAX_TRIALS, 5, 3) and draws.trial_uniforms.shape == (
        2,
        MAX_TRIALS,
        5,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft": 0}, "num_draft counts steps and must be at least 1, got 0"),
        ({"prefill": 1.5}, r"prefill is a share of the steps and must be in 0\.\.1, got 1.5"),
        ({"prefill": float("nan")}, "prefill is a share of the steps"),
        ({"inner_temperature": 0.0}, "inner_temperature must be above 0 and finite, got 0.0"),
        ({"inner_temperature": float("nan")}, "inner_temperature must be above 0 and finite, got nan"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculationParams(**options)


def test_models_of_other_tokens_and_bad_steps_are_refused(models) -> None:
    draft, target = models
    with pytest.raises(ValueError, match="draft and target must have the same latent_dim, got 4 and 3"):
        generate(MAR.from_config(dict(draft.config) | {"latent_dim": 4}), target)
    with pytest.raises(ValueError, match=r"num_steps must be in 1\.\.16, got 17"):
        generate(draft, target, num_steps=17)
    with pytest.raises(ValueError, match="at least 2 denoising steps"):
        generate(draft, target, num_inference_steps=1)
