"""xAR's loop against the plain way: the whole sequence again in every call, without a cache, both branches always."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.host_sync import no_host_sync
from vistok.decoding import flow_sampling
from vistok.decoding.flow_sampling import SharedModulations, generate_flow
from vistok.decoding.guidance import (
    ConstantGuidance,
    GuidanceSchedule,
    RampGuidance,
    StepsGuidance,
    apply_guidance,
    make_guidance,
)
from vistok.decoding.step_schedules import annealed_steps
from vistok.decoding.streams import ImageStreams, StepNoise
from vistok.models.generators.xar import XAR, Modulations, noisy_context_loss
from vistok.models.heads.flow import Euler, EulerMaruyama, FlowHead
from vistok.models.tokenizers.kl import KLTokenizer

LABELS = torch.tensor([3, 1, 4, 0])
STEPS = 4


@dataclass(frozen=True)
class LateGuidance:
    """Off, on, off, on, off ..."""

    scale: float = 2.0

    def at(self, step: int, num_steps: int) -> float:
        return self.scale if step % 2 else 1.0


def make(order: str = "cells-2", layout: str = "4x4", num_tokens: int = 16) -> XAR:
    torch.manual_seed(0)
    model = XAR(
        latent_dim=3,
        latent_scale=0.5,
        num_tokens=num_tokens,
        layout=layout,
        order=order,
        num_classes=5,
        dim=32,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=4,
        mlp_dim=40,
    )
    with torch.no_grad():
        model.class_embed.weight.mul_(30)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> XAR:
    return make()


def draw(model: XAR, rows: slice = slice(None), **options) -> Tensor:
    streams = ImageStreams.from_seeds(range(10, 14)[rows])
    options = {"num_inference_steps": STEPS, "guidance": RampGuidance(2.5)} | options
    return generate_flow(model, LABELS[rows], streams=streams, **options).data


@torch.no_grad()
def plain(model: XAR, guidance: GuidanceSchedule, head: FlowHead) -> Tensor:
    """What `draw` should give, from the training pass."""
    streams, order = ImageStreams.from_seeds(range(10, 14)), model.order
    latents = torch.zeros(4, model.num_tokens, model.latent_dim)
    for step, positions in enumerate(order.plan()):

        def velocity(noisy: Tensor, time: float, step=step, positions=positions) -> Tensor:
            state = latents.clone()
            state[:, positions] = noisy.float()
            times = torch.zeros(4, order.num_steps)
            times[:, step] = time
            null = torch.full_like(LABELS, model.null_label)
            cond, uncond = (model(state, times, labels)[:, positions] for labels in (LABELS, null))
            return apply_guidance(cond.double(), uncond.double(), guidance.at(step, order.num_steps))

        noise = StepNoise(streams, (len(positions), model.latent_dim), torch.device("cpu"))
        latents[:, positions] = head.sample(velocity, noise, num_inference_steps=STEPS).float()
    return latents / model.latent_scale


@pytest.mark.parametrize(
    "guidance",
    [ConstantGuidance(), ConstantGuidance(2.0), RampGuidance(2.5), StepsGuidance(2.0, 2), LateGuidance()],
)
@pytest.mark.parametrize("integrator", [Euler(), EulerMaruyama()])
def test_it_is_the_plain_way_under_every_guidance(model, guidance, integrator) -> None:
    head = FlowHead(integrator)
    drawn = draw(model, guidance=guidance, head=head)
    torch.testing.assert_close(drawn, plain(model, guidance, head), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("order", "layout", "num_tokens"),
    [
        ("raster", "2x3", 6),
        ("interleaved-2", "4x4", 16),
        ("scales", "1x1+2x1+3x5", 18),
        ("blocks-16", "4x4", 16),
        ("random-3", "2x3", 6),
    ],
)
def test_it_is_the_plain_way_in_every_order(order: str, layout: str, num_tokens: int) -> None:
    model = make(order, layout, num_tokens)
    guidance = RampGuidance(2.5)
    expected = plain(model, guidance, model.head)
    torch.testing.assert_close(draw(model, guidance=guidance), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(draw(model, guidance=ConstantGuidance()), expected, atol=1e-2)


def test_an_image_does_not_depend_on_its_batch(model) -> None:
    together = draw(model)
    torch.testing.assert_close(draw(model, slice(2, 3)), together[2:3], atol=1e-5, rtol=0)
    assert torch.equal(draw(model), together)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_unconditional_branch_is_computed_only_where_it_is_used(model, monkeypatch) -> None:
    rows: list[int] = []
    velocity = model.velocity

    def counted(latents: Tensor, *arguments) -> Tensor:
        rows.append(len(latents))
        return velocity(latents, *arguments)

    monkeypatch.setattr(model, "velocity", counted)
    draw(model, guidance=ConstantGuidance())
    assert rows == [4] * 16
    rows.clear()
    draw(model, guidance=RampGuidance(2.0))
    assert rows == [4] * 4 + [8] * 12
    rows.clear()
    draw(model, guidance=StepsGuidance(2.0, 2))
    assert rows == [8] * 8 + [4] * 8


def test_other_labels_can_be_led_away_from(model) -> None:
    away = draw(model, null_labels=torch.tensor([0, 0, 0, 0]))
    assert not torch.allclose(away, draw(model), atol=1e-2)
    same = draw(model, null_labels=LABELS)
    torch.testing.assert_close(same, draw(model, guidance=ConstantGuidance()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("most_kept", [flow_sampling.MODULATIONS_KEPT, 0])
def test_fewer_steps_for_later_cells(model, monkeypatch, most_kept: int) -> None:
    monkeypatch.setattr(flow_sampling, "MODULATIONS_KEPT", most_kept)
    times: list[float] = []
    at = SharedModulations.at

    def recorded(modulations: SharedModulations, asked: list[float], num_rows: int) -> Modulations:
        times.append(asked[-1])
        found = at(modulations, asked, num_rows)
        labels = torch.cat([LABELS, torch.full((4,), model.null_label)])[:num_rows]
        expected = model.modulate(torch.tensor([asked]).expand(num_rows, -1), labels)
        torch.testing.assert_close(found, expected)
        return found

    monkeypatch.setattr(SharedModulations, "at", recorded)
    counts = annealed_steps(4, most=6, least=3)
    draw(model, num_inference_steps=counts)
    starts = [call for call, time in enumerate(times) if time == 1.0]
    assert counts == (6, 5, 4, 3) and starts == [0, 6, 11, 15] and len(times) == 18


def test_modulations_are_made_once_for_every_class_and_time(model, monkeypatch) -> None:
    made: list[torch.Size] = []
    modulate = model.modulate

    def counted(times: Tensor, labels: Tensor) -> Modulations:
        made.append(times.shape)
        return modulate(times, labels)

    monkeypatch.setattr(model, "modulate", counted)
    labels = torch.tensor([3, 1, 3, 3])
    generate_flow(model, labels, streams=ImageStreams.from_seeds(range(4)), num_inference_steps=STEPS)
    assert made == [(3, STEPS + 1)]  # two classes and none; all times, and that of what is decided


def test_annealed_steps_are_the_published_ones() -> None:
    assert annealed_steps(4, 50, 15) == (50, 38, 26, 15)
    assert annealed_steps(4, 40, 10) == (40, 30, 20, 10)
    assert annealed_steps(64, 50, 5)[:6] == (50, 49, 48, 47, 47, 46)
    assert annealed_steps(64, 50, 5)[-4:] == (7, 6, 5, 5)
    assert annealed_steps(1, 50, 15) == (50,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5, 3), "at least one step"), ((4, 3, 5), "most 3, least 5"), ((4, 5, 0), "least 0")],
)
def test_annealing_that_makes_no_sense_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annealed_steps(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 2}, "at least 3 steps.*got 2"),
        ({"num_inference_steps": [5, 5, 5, 2]}, "at least 3 steps.*got 2"),
        ({"num_inference_steps": [5, 5]}, "one integer or 4 of them"),
        ({"null_labels": torch.tensor([0])}, r"class_labels must be \[4\], got \[1\]"),
        ({"null_labels": torch.tensor([0, 0, 0, 6])}, r"must be in 0\.\.4, or 5 for none"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(model, on_step=lambda step, latents: pytest.fail("it has begun"), **options)


@pytest.mark.parametrize("scale", [float("nan"), 0.5, -1.0, float("inf")])
def test_a_ramp_of_guidance_starts_at_off(scale: float) -> None:
    assert [RampGuidance(2.7).at(step, 4) for step in range(4)] == pytest.approx(
        [1, 1 + 1.7 / 3, 1 + 3.4 / 3, 2.7]
    )
    assert RampGuidance(2.7).at(0, 4) == 1.0 and RampGuidance(2.7).at(0, 1) == 2.7
    assert make_guidance("ramp", 2.7) == RampGuidance(2.7)
    with pytest.raises(ValueError, match="at least 1"):
        RampGuidance(scale)


@torch.no_grad()
def test_tokens_are_not_scaled_and_decode_as_they_are(model) -> None:
    tokenizer = KLTokenizer(
        image_size=8, latent_channels=3, dims=(4, 8), depth=1, num_groups=2, scaling_factor=0.5
    ).eval()
    seen: list[Tensor] = []
    streams = ImageStreams.from_seeds([1, 2, 3, 4])
    tokens = generate_flow(
        model,
        LABELS,
        streams=streams,
        num_inference_steps=STEPS,
        on_step=lambda step, latents: seen.append(latents),
    )
    assert tokens.data.dtype == torch.float32 and tokenizer.decode(tokens).shape == (4, 3, 8, 8)
    assert torch.equal(seen[-1], tokens.data)
    first = model.order.plan()[0]
    assert torch.equal(seen[0][:, first], tokens.data[:, first])
    assert int((seen[0] != 0).sum()) == 4 * 3 * len(first)


def test_half_precision_is_in_the_network_only(model) -> None:
    half = make().to(torch.bfloat16)
    states: set[torch.dtype] = set()
    times: set[torch.dtype] = set()
    modulate = half.modulate

    @dataclass(frozen=True)
    class Watched(EulerMaruyama):
        def step(self, state: Tensor, velocity: Tensor, time: float, after: float, noise) -> Tensor:
            states.update({state.dtype, velocity.dtype})
            return super().step(state, velocity, time, after, noise)

    def recorded(time: Tensor, labels: Tensor) -> Modulations:
        times.add(time.dtype)
        return modulate(time, labels)

    half.modulate = recorded  # type: ignore[method-assign]
    drawn = draw(half, head=FlowHead(Watched()))
    assert (states, times, drawn.dtype) == ({torch.float64}, {torch.float32}, torch.float32)
    exact = draw(model)
    assert (drawn - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_model_that_has_drawn_can_be_trained() -> None:
    model = make("interleaved-4")
    draw(model)
    latents, noise = torch.randn(4, 16, 3), torch.randn(4, 16, 3)
    noisy_context_loss(model, latents, LABELS, torch.rand(4, 16), noise).backward()
    assert model.latent_embed.weight.grad is not None


@pytest.mark.parametrize("most_kept", [flow_sampling.MODULATIONS_KEPT, 0])
def test_nothing_waits_for_the_device_between_the_steps(model, monkeypatch, most_kept: int) -> None:
    monkeypatch.setattr(flow_sampling, "MODULATIONS_KEPT", most_kept)
    done: list[int] = []
    with contextlib.ExitStack() as steps:

        def watch(step: int, latents: Tensor) -> None:
            done.append(step)
            if step == 0:
                steps.enter_context(no_host_sync())
            if step == 3:
                steps.close()

        draw(model, on_step=watch, guidance=RampGuidance(2.0))
    assert done == [0, 1, 2, 3]


def test_tokens_that_are_not_finite_name_their_step_and_image(model, monkeypatch) -> None:
    velocity, calls = model.velocity, []

    def spoiled(latents: Tensor, *arguments) -> Tensor:
        calls.append(1)
        result = velocity(latents, *arguments)
        return result if len(calls) <= STEPS else result.index_fill(0, torch.tensor(2), float("inf"))

    monkeypatch.setattr(model, "velocity", spoiled)
    with pytest.raises(
        ValueError, match="XAR gave NaN or infinity at step 1 of 4, counted from 0, for image 2: are"
    ):
        draw(model, guidance=ConstantGuidance())
