"""What every family of generators does in a pipeline: seeds, guidance, negatives, processors, callbacks, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vistok
from tests.pipelines.families import (
    CONTINUOUS,
    FAMILIES,
    MASKED,
    TEXT_FAMILIES,
    draw,
    encode,
    is_same,
    make_pipeline,
    prompts_of,
)


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {family: make_pipeline(family, guidance_scale=2.0) for family in [*FAMILIES, *CONTINUOUS]}


@pytest.fixture(params=[*FAMILIES, *CONTINUOUS])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(pipelines: dict[str, Any], family: str) -> Any:
    return pipelines[family]


def test_a_seed_gives_the_same_image_alone_and_among_sixteen(pipeline: Any, family: str) -> None:
    prompts, seeds = prompts_of(family, 16), list(range(20, 36))
    batch = draw(pipeline, prompts, seed=seeds)
    assert batch.shape[:2] == (16, 16)
    for row in (0, 7, 15):
        assert is_same(draw(pipeline, prompts[row], seed=seeds[row])[0], batch[row])
    assert len(batch.unique(dim=0)) > 12
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(draw(pipeline, prompts, generator=generators), batch)


def test_several_images_of_a_prompt_count_seeds_up(pipeline: Any, family: str) -> None:
    first, second = prompts_of(family, 2)
    batch = draw(pipeline, [first, second], num_images_per_prompt=3, seed=5)
    assert is_same(draw(pipeline, second, seed=7)[0], batch[5])
    assert not is_same(batch[4], batch[5])


def test_guidance_changes_the_image_and_1_is_off(pipeline: Any, family: str) -> None:
    prompts = prompts_of(family, 4)
    off = draw(pipeline, prompts, guidance_scale=1.0)
    assert not is_same(draw(pipeline, prompts), off)
    if family not in (*MASKED, *CONTINUOUS):
        assert torch.equal(draw(pipeline, prompts, guidance_tokens=16), draw(pipeline, prompts))
        first_step_only = draw(pipeline, prompts, guidance_tokens=0)
        first = pipeline.transformer.order.plan()[0]
        assert torch.equal(first_step_only[:, first], draw(pipeline, prompts)[:, first])
        assert not torch.equal(first_step_only, draw(pipeline, prompts))


def test_a_negative_is_what_guidance_leads_away_from(pipeline: Any, family: str) -> None:
    first, second, third, other = prompts_of(family, 4)
    name = pipeline.negative_argument
    prompts = [first, second, third]
    plain = draw(pipeline, prompts)
    away = draw(pipeline, prompts, **{name: other})
    assert not is_same(away, plain)
    mixed = draw(pipeline, prompts, **{name: [other, first, other]})
    assert is_same(mixed[0], away[0]) and is_same(mixed[2], away[2])
    # Away from itself leads nowhere: guided logits are the conditional ones.
    itself = draw(pipeline, prompts, **{name: prompts})
    assert is_same(itself, draw(pipeline, prompts, guidance_scale=1.0))
    with pytest.raises(ValueError, match=f"{name} needs guidance, and guidance_scale is 1.0"):
        pipeline(first, guidance_scale=1.0, **{name: other})
    with pytest.raises(ValueError, match=r"2 rows of .* for 3 images"):
        pipeline(prompts, **{name: [first, other]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_logits_processor_decides_what_can_be_drawn(pipelines: dict[str, Any], family: str) -> None:
    pipeline, shapes = pipelines[family], []

    def only_even_ids(logits: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        assert logits.dtype == torch.float32
        is_odd = torch.arange(logits.shape[-1]) % 2 == 1
        return logits.masked_fill(is_odd, float("-inf"))

    prompts = prompts_of(family, 2)
    assert (draw(pipeline, prompts) % 2 == 1).any()
    drawn = draw(pipeline, prompts, logits_processor=only_even_ids)
    assert (drawn % 2 == 0).all()
    assert {shape[0] for shape in shapes} == {2} and {shape[2] for shape in shapes} == {20}


def test_the_callback_sees_every_step(pipeline: Any, family: str) -> None:
    seen, name = [], "latents" if family in CONTINUOUS else "indices"
    drawn = draw(
        pipeline,
        prompts_of(family, 1),
        callback_on_step_end=lambda _, step, total, state: seen.append((step, total, state[name].clone())),
    )
    steps = {"any-order-cells": 4, "nar-class": 7, "nar-text": 7} | dict.fromkeys(MASKED, 8)
    steps |= {"xar-cells": 4, "xar-diagonal": 7, "mar": 5}
    total = steps.get(family, 16)
    assert [(step, count) for step, count, _ in seen] == [(step, total) for step in range(total)]
    assert torch.equal(seen[-1][2], drawn)


def test_the_tokenizer_may_be_of_another_precision(family: str) -> None:
    pipeline = make_pipeline(family, guidance_scale=2.0)
    pipeline.transformer.to(torch.bfloat16)
    prompts = prompts_of(family, 2)
    images = pipeline(prompts, output_type="pt").images
    assert pipeline.tokenizer.dtype == images.dtype == torch.float32
    assert torch.isfinite(images).all() and images.shape == (2, 3, 16, 16)
    pipeline.to(torch.bfloat16)
    assert len(pipeline(prompts).images) == 2
    assert torch.isfinite(torch.from_numpy(pipeline(prompts, output_type="np").images)).all()


def test_a_saved_pipeline_draws_the_same(pipeline: Any, family: str, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = vistok.load(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    if family in TEXT_FAMILIES:
        loaded.text_encoder = encode
    assert loaded.sampling_settings() == pipeline.sampling_settings()
    prompts = prompts_of(family, 2)
    assert torch.equal(draw(loaded, prompts), draw(pipeline, prompts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 0.9}, "guidance_scale must be at least 1, which is off, and finite; got 0.9"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be at least 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be at least 1"),
    ],
)
def test_guidance_that_cannot_be_is_refused(pipeline: Any, family: str, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(prompts_of(family, 1), **settings)
    with pytest.raises(ValueError, match=message):
        make_pipeline(family, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 21}, "top_k 21 is larger than the vocabulary of 20"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\]"),
        ({"typical_p": 0.0}, r"typical_p must be in \(0, 1\]"),
        ({"guidance_tokens": -1}, "guidance_tokens must be at least 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_the_work(settings, message: str, monkeypatch) -> None:
    def must_not_run(*arguments: object, **options: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("vistok.pipelines.drawing.generate_ordered", must_not_run)
    with pytest.raises(ValueError, match=message):
        make_pipeline("llamagen-class")(1, **settings)
    with pytest.raises(ValueError, match=message):
        make_pipeline("llamagen-class", **settings)


def test_typical_sampling_reaches_the_sampler(pipelines: dict[str, Any]) -> None:
    pipeline = pipelines["llamagen-class"]
    plain, typical = (draw(pipeline, [1] * 8, seed=list(range(8)), typical_p=p) for p in (1.0, 0.1))
    assert len(typical.unique()) < len(plain.unique())


@pytest.mark.parametrize("name", ["llamagen-class", "nar-class", "any-order-random-sequence"])
def test_fewer_tokens_need_raster_order_and_a_variable_length(pipelines: dict[str, Any], name: str) -> None:
    reason = "in PermutationOrder: " if "random" in name else "it is no variable-length tokenizer: "
    with pytest.raises(ValueError, match=f"{reason}num_tokens cannot be chosen"):
        pipelines[name](1, num_tokens=3)
    with pytest.raises(ValueError, match=f"{reason}there are no previews"):
        pipelines[name](1, preview_callback=print)


def test_a_generator_on_another_device_seeds_one_on_the_cpu(monkeypatch) -> None:
    class ElsewhereGenerator(torch.Generator):
        device = torch.device("meta")

    monkeypatch.setattr(
        "torch.randint",
        lambda high, shape, generator, device: torch.full(shape, 11) if device.type == "meta" else None,
    )
    pipeline = make_pipeline("llamagen-class")
    assert torch.equal(draw(pipeline, 1, generator=ElsewhereGenerator()), draw(pipeline, 1, seed=11))


def test_texts_and_classes_are_not_confused() -> None:
    text, classes = make_pipeline("llamagen-text"), make_pipeline("llamagen-class")
    with pytest.raises(
        ValueError, match="LlamaGenText is not conditioned on a class; use TextToImagePipeline"
    ):
        vistok.ClassToImagePipeline(text.tokenizer, text.transformer)
    with pytest.raises(
        ValueError, match="LlamaGenClass is not conditioned on a text; use ClassToImagePipeline"
    ):
        vistok.TextToImagePipeline(classes.tokenizer, classes.transformer)


def test_negatives_of_each_kind_of_call(pipelines: dict[str, Any]) -> None:
    classes = pipelines["llamagen-class"]
    with pytest.raises(ValueError, match="class 5 is out of range"):
        classes(1, negative_class=5)
    with pytest.raises(ValueError, match="give negative_class or null_class"):
        classes(1, negative_class=2, null_class=0)
    for family in TEXT_FAMILIES:
        plain = draw(pipelines[family], "cat")
        assert torch.equal(draw(pipelines[family], "cat", negative_prompt=" "), plain)
    features = encode(["cat"])
    with pytest.raises(ValueError, match="give negative_prompt or null_features"):
        pipelines["flex-ar-text"](prompt_features=features, null_features=features, negative_prompt="dog")
    own = draw(pipelines["llamagen-text"], prompt_features=features)  # its null caption is inside the model
    assert torch.equal(own, draw(pipelines["llamagen-text"], "cat"))
