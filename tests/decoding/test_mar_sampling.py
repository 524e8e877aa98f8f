"""MAR's loop: the schedule, independence of the batch, guidance, annealing, context reuse, bad input."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.host_sync import no_host_sync
from vistok import MAR
from vistok.decoding import mar_sampling
from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.guidance import ConstantGuidance, LinearGuidance, StepsGuidance
from vistok.decoding.mar_sampling import Backbone, GuidedDenoiser, generate_mar, hidden_counts, make_plan
from vistok.decoding.step_schedules import annealed_steps
from vistok.decoding.streams import ImageStreams
from vistok.models.heads.diffusion import DiffusionHead
from vistok.tokens import Tokens

LABELS = torch.tensor([3, 1, 4, 0])
SEEDS = [5, 6, 7, 8]
HEAD = DiffusionHead(last_timestep=950)  # with random weights chains from 999 give values of 1e4
STEPS = 6
FEW = {"num_steps": STEPS, "num_inference_steps": 4, "head": HEAD}


@pytest.fixture(scope="module")
def model() -> MAR:
    torch.manual_seed(0)
    model = MAR(
        latent_dim=3,
        latent_scale=0.5,
        num_tokens=16,
        layout="4x4",
        num_classes=5,
        num_buffer_tokens=2,
        dim=24,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=2,
        mlp_dim=32,
        denoiser_dim=16,
        denoiser_depth=2,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def generate(model: MAR, labels: Tensor = LABELS, seeds: list[int] = SEEDS, **options) -> Tokens:
    return generate_mar(model, labels, streams=ImageStreams.from_seeds(seeds), **FEW | options)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9, 16, 64, 256])
def test_every_step_of_the_schedule_decides_something(num_tokens: int) -> None:
    for num_steps in {*range(1, min(num_tokens, 20) + 1), num_tokens // 2 or 1, num_tokens}:
        hidden = hidden_counts(num_tokens, num_steps)
        assert len(hidden) == num_steps and hidden[-1] == 1 and num_tokens >= hidden[0]
        assert all(before > after for before, after in pairwise([num_tokens + 1, *hidden[:-1]]))


def test_the_schedule_is_the_published_one() -> None:
    assert hidden_counts(256, 256) == [*range(255, 0, -1), 1]
    counts = hidden_counts(256, 64)
    decided = [before - after for before, after in pairwise([256, *counts[:-1], 0])]
    assert decided[:19] == [1] * 13 + [2, 3, 2, 2, 3, 3]
    assert max(decided) == 7 and sum(decided) == 256


@pytest.mark.parametrize("num_steps", [0, 17])
def test_more_steps_than_tokens_are_refused(model, num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps must be in 1\.\.16, got {num_steps}"):
        generate(model, num_steps=num_steps)


def test_every_position_is_decided_once_and_stays(model) -> None:
    canvases = [torch.zeros(4, 16, 3)]
    tokens = generate(model, on_step=lambda step, latents: canvases.append(latents.clone()))
    decided = [(canvas != 0).any(dim=-1) for canvas in canvases]
    counts = [int(mask.sum(dim=1).unique()) for mask in decided]  # the same in every image
    assert counts == [0, *(16 - count for count in hidden_counts(16, STEPS)[:-1]), 16]
    for (before, after), mask in zip(pairwise(canvases), decided, strict=False):
        assert torch.equal(after[mask], before[mask])
    assert tokens.latents is not None and torch.equal(canvases[-1], tokens.latents)
    assert str(tokens.layout) == "4x4"


def test_the_end_of_a_given_order_is_decided_first(model) -> None:
    orders = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    plan = make_plan(model, 4, STEPS, orders, ImageStreams.from_seeds(SEEDS))
    for (start, end), after in zip(plan.spans, [*hidden_counts(16, STEPS)[:-1], 0], strict=True):
        assert torch.equal(plan.sequence[:, start:end], orders[:, after : 16 - start].sort(dim=1).values)
        assert after == 16 - end


def test_random_orders_differ_between_images_and_are_permutations(model) -> None:
    sequence = make_plan(model, 4, STEPS, None, ImageStreams.from_seeds(SEEDS)).sequence
    assert torch.equal(sequence.sort(dim=1).values, torch.arange(16).expand(4, -1))
    assert len(sequence.unique(dim=0)) == 4


@pytest.mark.parametrize("options", [{}, {"guidance": LinearGuidance(2.0)}, {"reuse": ContextReuse(2)}])
def test_an_image_does_not_depend_on_its_neighbours(model, options: dict) -> None:
    together = generate(model, **options).data
    for image, seed in enumerate(SEEDS):
        alone = generate(model, LABELS[image : image + 1], [seed], **options).data
        torch.testing.assert_close(together[image : image + 1], alone, atol=1e-3, rtol=1e-3)
    assert torch.equal(generate(model, **options).data, together)
    again = generate(model, LABELS.flip(0), SEEDS[::-1], **options).data.flip(0)
    torch.testing.assert_close(again, together, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(generate(model, seeds=[1, 2, 3, 4], **options).data, together, atol=0.1)


def test_tokens_are_not_scaled(model) -> None:
    """The scale is a matter between the model and its training only."""
    expected = generate(model).data
    scale, model.latent_scale = model.latent_scale, 0.25
    try:
        torch.testing.assert_close(generate(model).data, 2 * expected)
    finally:
        model.latent_scale = scale


def test_without_guidance_the_unconditional_branch_is_not_computed(model, monkeypatch) -> None:
    rows: list[int] = []
    encode = MAR.encode
    monkeypatch.setattr(
        MAR, "encode", lambda self, *args: rows.append(len(args[0])) or encode(self, *args), raising=True
    )
    generate(model)
    generate(model, guidance=ConstantGuidance(1.0))
    assert set(rows) == {4}
    rows.clear()
    generate(model, guidance=ConstantGuidance(2.0))
    assert set(rows) == {8}
    rows.clear()
    generate(model, guidance=StepsGuidance(2.0, num_guided=8))  # counts decided tokens
    hidden = hidden_counts(16, STEPS)
    assert rows == [8 if 16 - count < 8 else 4 for count in hidden]


def test_guidance_counts_the_tokens_decided_after_a_step(model) -> None:
    plan = make_plan(model, 4, STEPS, None, ImageStreams.from_seeds(SEEDS))
    expected = [1 + 1.9 * (16 - count) / 16 for count in hidden_counts(16, STEPS)]
    assert plan.scales(LinearGuidance(2.9)) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(1 + 1.9 * 15 / 16)


def test_guidance_moves_away_from_the_null_labels(model) -> None:
    guided = generate(model, guidance=ConstantGuidance(3.0)).data
    assert not torch.allclose(guided, generate(model).data, atol=1e-2)
    same = generate(model, guidance=ConstantGuidance(3.0), null_labels=LABELS).data
    torch.testing.assert_close(same, generate(model).data, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_modulations_made_ahead_change_nothing(model, monkeypatch, scale: float, rows_at_once: int) -> None:
    monkeypatch.setattr(mar_sampling, "ROWS_AT_ONCE", rows_at_once)
    conditions, noisy = torch.randn(4, 3, 24), torch.randn(2, 3, 3)
    timesteps = HEAD.chain(9).timesteps
    predict = GuidedDenoiser(model.denoiser, conditions, scale, timesteps.tolist(), 2)
    for timestep in timesteps.flip(0):
        cond, uncond = model.denoiser(noisy.repeat(2, 1, 1), timestep.expand(4, 3), conditions).chunk(2)
        noise = uncond[..., :3] + scale * (cond[..., :3] - uncond[..., :3])
        expected = torch.cat([noise, cond[..., 3:]], dim=-1)
        torch.testing.assert_close(predict(noisy, float(timestep)), expected, atol=1e-4, rtol=1e-4)


def test_annealing_gives_every_step_its_own_chain(model, monkeypatch) -> None:
    asked: list[int] = []
    sample = DiffusionHead.sample
    monkeypatch.setattr(
        DiffusionHead,
        "sample",
        lambda self, *args, **options: (
            asked.append(options["num_inference_steps"]) or sample(self, *args, **options)
        ),
    )
    steps = annealed_steps(STEPS, 9, 3)
    annealed = generate(model, num_inference_steps=steps)
    assert tuple(asked) == steps == (9, 7, 6, 5, 4, 3)
    assert not torch.allclose(annealed.data, generate(model, num_inference_steps=9).data, atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_full_evaluations_with_caches_are_those_without(model, scale: float) -> None:
    labels = LABELS if scale == 1.0 else torch.cat([LABELS, torch.full_like(LABELS, 5)])
    plan = make_plan(model, 4, STEPS, None, ImageStreams.from_seeds(SEEDS))
    latents = torch.randn(4, 16, 3)
    cached, plain = (Backbone(model, labels, plan.sequence, ContextReuse(period)) for period in (2, 1))
    for start, end in plan.spans:
        expected = plain.conditions(latents, start, end)
        full = cached.conditions(latents, start, end)
        torch.testing.assert_close(full, expected, atol=1e-5, rtol=1e-4)
        # nothing new is decided, so nothing that was kept is out of date
        cheap = cached.conditions(latents, start, end, is_full=False)
        torch.testing.assert_close(cheap, expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_cheap_evaluations_see_new_tokens_and_keep_the_rest(model) -> None:
    plan = make_plan(model, 4, STEPS, None, ImageStreams.from_seeds(SEEDS))
    latents = torch.randn(4, 16, 3)
    (_, first), (start, end), *_ = plan.spans[1:]
    for position, is_seen in ((0, False), (first - 1, True), (start - 1, True), (end, False)):
        backbone = Backbone(model, LABELS, plan.sequence, ContextReuse(2))
        results = []
        for shift in (0.0, 1.0):
            backbone.conditions(latents, *plan.spans[1])
            changed = latents.clone()
            changed[torch.arange(4), plan.sequence[:, position]] += shift
            results.append(backbone.conditions(changed, start, end, is_full=False))
        assert torch.equal(*results) is not is_seen


def test_context_reuse_is_close_and_closer_with_more_full_evaluations(model) -> None:
    labels, seeds = LABELS.repeat(4), list(range(16))
    options = {"num_steps": 16, "num_inference_steps": 4, "head": DiffusionHead(0.0, 500)}
    full = generate(model, labels, seeds, **options).data
    errors = [
        float((generate(model, labels, seeds, **options, reuse=reuse).data - full).square().mean().sqrt())
        for reuse in (ContextReuse(1), ContextReuse(2, warm_up=8), ContextReuse(2), ContextReuse(16))
    ]
    assert errors[0] == 0 and errors[1] < errors[2] < errors[3] < 0.5 * float(full.std())


def test_full_evaluations_follow_the_schedule_of_reuse() -> None:
    assert [step for step in range(9) if ContextReuse(3).is_full(step)] == [0, 3, 6]
    assert [step for step in range(9) if ContextReuse(4, warm_up=2).is_full(step)] == [0, 1, 2, 6]
    assert all(ContextReuse(1).is_full(step) for step in range(9))
    with pytest.raises(
        ValueError, match="period counts evaluations and must be at least 1, which is off; got 0"
    ):
        ContextReuse(0)
    with pytest.raises(ValueError, match="warm_up counts evaluations and must be at least 0, got -1"):
        ContextReuse(2, -1)


def test_half_precision_gives_float32_tokens_close_to_those_of_float32(model) -> None:
    wide = generate(model, guidance=LinearGuidance(2.0)).data
    half = MAR.from_config(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    narrow = generate(half, guidance=LinearGuidance(2.0)).data
    assert narrow.dtype == torch.float32
    assert float((narrow - wide).square().mean().sqrt()) < 0.2 * float(wide.std())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 1}, "at least 2 denoising steps.*got 1"),
        ({"num_inference_steps": [4] * 5}, "one integer or 6 of them, one per step"),
        ({"num_inference_steps": [4] * 5 + [1]}, "at least 2 denoising steps.*got 1"),
        ({"num_inference_steps": 1001}, "cannot give 1001"),
        ({"orders": torch.arange(16)}, r"orders must be \[4, 16\], a permutation of 0\.\.15 per image"),
        ({"orders": torch.zeros(4, 16, dtype=torch.int64)}, "orders must be .* a permutation"),
        ({"null_labels": torch.tensor([1])}, r"class_labels must be \[4\], got \[1\]"),
    ],
)
def test_wrong_options_are_refused(model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **options)


@pytest.mark.parametrize("scale", [float("nan"), -1.0, 0.5, float("inf")])
def test_wrong_guidance_is_refused(scale: float) -> None:
    for schedule in (ConstantGuidance, LinearGuidance):
        with pytest.raises(ValueError, match="guidance_scale must be at least 1, which is off, and finite"):
            schedule(scale)


def test_labels_out_of_range_are_refused(model) -> None:
    with pytest.raises(ValueError, match="class labels must be in 0..4, or 5 for none"):
        generate(model, LABELS + 3)


@pytest.mark.parametrize("reuse", [None, ContextReuse(2)])
def test_nothing_waits_for_the_device_between_the_steps(model, reuse: ContextReuse | None) -> None:
    done: list[int] = []
    with contextlib.ExitStack() as steps:

        def watch(step: int, latents: Tensor) -> None:
            done.append(step)
            if step == 0:
                steps.enter_context(no_host_sync())
            if step == STEPS - 1:
                steps.close()

        generate(model, on_step=watch, guidance=LinearGuidance(2.0), reuse=reuse)
    assert done == list(range(STEPS))


def test_tokens_that_are_not_finite_name_their_step_and_image(model, monkeypatch) -> None:
    sample, calls = DiffusionHead.sample, []

    def spoiled(*arguments, **options) -> Tensor:
        calls.append(1)
        drawn = sample(*arguments, **options)
        return drawn if len(calls) != 3 else drawn.index_fill(0, torch.tensor([0, 3]), float("nan"))

    monkeypatch.setattr(DiffusionHead, "sample", spoiled)
    with pytest.raises(
        ValueError, match="MAR gave NaN or infinity at step 2 of 6, counted from 0, for image 0, 3: are"
    ):
        generate(model, reuse=ContextReuse(8))
