"""xAR and MAR in pipelines: their settings, what these cost in evaluations of the networks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.pipelines.families import CONTINUOUS, draw, is_same, make_pipeline
from vistok.decoding.flow_sampling import generate_flow
from vistok.decoding.guidance import LinearGuidance, RampGuidance
from vistok.decoding.mar_sampling import generate_mar
from vistok.decoding.step_schedules import annealed_steps
from vistok.decoding.streams import ImageStreams
from vistok.models.heads.diffusion import DiffusionHead
from vistok.models.heads.flow import Euler, FlowHead


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {family: make_pipeline(family) for family in CONTINUOUS}


@pytest.fixture
def xar(pipelines: dict[str, Any]) -> Any:
    return pipelines["xar-cells"]


@pytest.fixture
def mar(pipelines: dict[str, Any]) -> Any:
    return pipelines["mar"]


def batch_sizes(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> list[int]:
    """Grows with every call of a method: the rows of its first argument."""
    original: Callable[..., Any] = getattr(owner, method)
    sizes: list[int] = []

    def counting(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(len(first))
        return original(first, *rest, **options)

    monkeypatch.setattr(owner, method, counting)
    return sizes


@pytest.mark.parametrize("family", CONTINUOUS)
def test_tokens_are_what_the_tokenizer_decodes(pipelines: dict[str, Any], family: str) -> None:
    pipeline = pipelines[family]
    tokens = pipeline([1, 3], output_type="tokens").images
    assert tokens.latents.shape == (2, 16, 3) and tokens.latents.dtype == torch.float32
    assert tokens.layout == pipeline.tokenizer.layout
    images = pipeline([1, 3], output_type="pt").images
    assert torch.equal(images, pipeline.tokenizer.decode(tokens))
    assert images.std() > 0.01


@pytest.mark.parametrize("family", CONTINUOUS)
def test_tokens_are_not_scaled(family: str) -> None:
    pipeline = make_pipeline(family)
    at_a_half = draw(pipeline, 2)
    pipeline.transformer.latent_scale = 0.25  # the network makes the same, which stands for twice as much
    torch.testing.assert_close(draw(pipeline, 2), 2 * at_a_half)


def test_settings_reach_the_loop_of_xar(xar: Any) -> None:
    settings = {"guidance_scale": 2.0, "num_final_inference_steps": 2, "integrator": "ode"}
    guided = make_pipeline("xar-cells", guidance_schedule="ramp")
    expected = generate_flow(
        guided.transformer,
        torch.tensor([2, 4]),
        streams=ImageStreams.from_seeds([5, 5]),
        num_inference_steps=[4, 3, 2, 2],
        head=FlowHead(Euler()),
        guidance=RampGuidance(2.0),
    )
    assert torch.equal(draw(guided, [2, 4], seed=5, **settings), expected.data)
    assert not is_same(draw(xar, [2, 4], seed=5, **settings), expected.data)  # guided alike at all cells
    for change in ({"guidance_scale": 1.5}, {"num_final_inference_steps": 1}):
        assert not is_same(draw(guided, [2, 4], seed=5, **settings | change), expected.data)
    assert not is_same(draw(xar, 2, integrator="ode"), draw(xar, 2))


def test_settings_reach_the_loop_of_mar(mar: Any) -> None:
    settings = {"guidance_scale": 2.0, "num_steps": 6, "num_final_inference_steps": 2, "temperature": 0.5}
    guided = make_pipeline("mar", guidance_schedule="linear", last_timestep=None)
    expected = generate_mar(
        guided.transformer,
        torch.tensor([2, 4]),
        streams=ImageStreams.from_seeds([5, 5]),
        num_steps=6,
        num_inference_steps=annealed_steps(6, 4, 2),
        head=DiffusionHead(temperature=0.5, last_timestep=950),  # as published with annealed steps
        guidance=LinearGuidance(2.0),
    )
    assert torch.equal(draw(guided, [2, 4], seed=5, **settings), expected.data)
    for change in ({"num_steps": 5}, {"temperature": 0.6}, {"num_final_inference_steps": 3}):
        assert not is_same(draw(guided, [2, 4], seed=5, **settings | change), expected.data)


def test_context_reuse_reaches_the_loop_of_mar(mar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = draw(mar, 2, reuse_period=1)
    assert torch.equal(draw(mar, 2), plain)
    assert not torch.equal(draw(mar, 2, reuse_period=2), plain)
    all_warm = make_pipeline("mar", reuse_period=2, reuse_warm_up=5)
    assert torch.equal(draw(all_warm, 2), plain)


def test_annealing_changes_how_often_xar_is_evaluated(xar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = batch_sizes(monkeypatch, xar.transformer, "velocity")
    draw(xar, 1, num_inference_steps=9)
    assert len(calls) == 4 * 9
    calls.clear()
    draw(xar, 1, num_inference_steps=9, num_final_inference_steps=3)
    assert len(calls) == 9 + 7 + 5 + 3


def test_annealing_changes_how_often_the_head_of_mar_is_evaluated(
    mar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = batch_sizes(monkeypatch, mar.transformer.denoiser, "denoise")
    draw(mar, 1, num_inference_steps=10)
    assert len(calls) == 5 * 10
    calls.clear()
    draw(mar, 1, num_inference_steps=10, num_final_inference_steps=2)
    assert len(calls) == 10 + 8 + 6 + 4 + 2


def test_annealed_chains_begin_at_timestep_950() -> None:
    pipeline = make_pipeline("mar", last_timestep=None)
    for changes, last in (
        ({}, 999),
        ({"num_final_inference_steps": 4}, 999),
        ({"num_final_inference_steps": 3}, 950),
    ):
        assert pipeline._settings(**changes).head.last_timestep == last
    assert make_pipeline("mar", num_final_inference_steps=3)._settings().head.last_timestep == 900


@pytest.mark.parametrize(("family", "method"), [("xar-cells", "velocity"), ("mar", "encode")])
def test_without_guidance_one_branch_is_evaluated(
    family: str, method: str, pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines[family]
    rows = batch_sizes(monkeypatch, pipeline.transformer, method)
    draw(pipeline, [1, 2, 3])
    assert set(rows) == {3}
    rows.clear()
    draw(pipeline, [1, 2, 3], guidance_scale=2.0)
    assert set(rows) == {6}


def test_steps_of_mar_are_at_most_one_per_token() -> None:
    pipeline = make_pipeline("mar", num_steps=None)
    assert pipeline.sampling_settings()["num_steps"] == 16
    with pytest.raises(ValueError, match=r"num_steps must be in 1\.\.16, got 17"):
        pipeline(1, num_steps=17)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("xar-cells", {"num_inference_steps": 2}, "Euler-Maruyama needs at least 3 steps"),
        ("xar-cells", {"num_final_inference_steps": 2}, "Euler-Maruyama needs at least 3 steps"),
        ("xar-cells", {"num_inference_steps": 0, "integrator": "ode"}, "must be at least 1, got 0"),
        (
            "xar-cells",
            {"num_final_inference_steps": 5},
            r"num_final_inference_steps must be in 1\.\.4, which is num_inference_steps; got 5",
        ),
        ("xar-cells", {"num_final_inference_steps": 0}, r"must be in 1\.\.4, .* got 0"),
        ("xar-cells", {"integrator": "rk4"}, "unknown integrator 'rk4'; choose one of sde, ode"),
        ("xar-cells", {"temperature": 0.9}, "temperature is not a setting of a XAR; it has guidance_scale, "),
        ("xar-cells", {"top_k": 3}, "top_k is not a setting of a XAR"),
        ("xar-cells", {"num_steps": 3}, "num_steps is not a setting of a XAR"),
        ("mar", {"num_inference_steps": 1}, "a chain needs at least 2 denoising steps"),
        ("mar", {"num_inference_steps": 1001}, "1000 timesteps cannot give 1001 denoising steps"),
        ("mar", {"num_final_inference_steps": 1}, "a chain needs at least 2 denoising steps"),
        ("mar", {"num_steps": 0}, r"num_steps must be in 1\.\.16, got 0"),
        ("mar", {"temperature": -0.1}, "temperature must be at least 0 and finite"),
        ("mar", {"reuse_period": 0}, "period counts evaluations and must be at least 1"),
        ("mar", {"guidance_scale": float("nan")}, "guidance_scale must be at least 1"),
        ("mar", {"guidance_scale": -2.0}, "guidance_scale must be at least 1"),
        ("mar", {"integrator": "ode"}, "integrator is not a setting of a MAR"),
        ("mar", {"choice_temperature": 1.0}, "choice_temperature is not a setting of a MAR"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_work(
    family: str, settings: dict, message: str, pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*arguments: object, **options: object) -> None:
        raise AssertionError("work began")

    for loop in ("generate_flow", "generate_mar"):
        monkeypatch.setattr(f"vistok.pipelines.drawing.{loop}", must_not_run)
    with pytest.raises(ValueError, match=message):
        pipelines[family](1, **settings)
    with pytest.raises(ValueError, match=message):
        make_pipeline(family, **settings)


@pytest.mark.parametrize(
    ("family", "preset", "message"),
    [
        ("xar-cells", {"guidance_schedule": "cubic"}, "unknown guidance schedule 'cubic'"),
        ("mar", {"last_timestep": 1000}, r"last_timestep must be in 1\.\.999, got 1000"),
        ("mar", {"reuse_warm_up": -1}, "warm_up counts evaluations and must be at least 0"),
    ],
)
def test_presets_that_cannot_be_are_refused(family: str, preset: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipeline(family, **preset)


@pytest.mark.parametrize("family", ["xar-cells", "mar"])
def test_what_needs_codes_is_refused(pipelines: dict[str, Any], family: str) -> None:
    pipeline = pipelines[family]
    name = type(pipeline.transformer).__name__
    tokens, keep = pipeline(1, output_type="tokens").images, torch.ones(16, dtype=torch.bool)
    message = f"{name} draws all of its continuous tokens: tokens and keep need a generator of codes"
    with pytest.raises(ValueError, match=message):
        pipeline(1, tokens=tokens, keep=keep)
    with pytest.raises(ValueError, match=f"{name} draws continuous tokens and has no logits"):
        pipeline(1, logits_processor=lambda logits: logits)
    fixed = "KLTokenizer decodes exactly 16 tokens, it is no variable-length tokenizer"
    with pytest.raises(ValueError, match=f"{fixed}: num_tokens cannot be chosen"):
        pipeline(1, num_tokens=8)
    with pytest.raises(ValueError, match=f"{fixed}: there are no previews"):
        pipeline(1, preview_callback=print)
    with pytest.raises(ValueError, match=f"null_class is not a setting of a {name}"):
        pipeline(1, guidance_scale=2.0, null_class=0)
