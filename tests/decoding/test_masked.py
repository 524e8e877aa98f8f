from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.host_sync import no_host_sync
from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.guidance import ConstantGuidance, LinearGuidance, PowerCosineGuidance, make_guidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked, gumbel, predict
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.maskgit import MaskGIT, MaskGITBert, MaskGITUViT
from vistok.order import ConfidenceOrder

LABELS = torch.tensor([0, 4, 2, 4])
SEEDS = [5, 6, 7, 8]


@pytest.fixture(params=[MaskGITBert, MaskGITUViT], ids=["bert", "uvit"])
def model(request: pytest.FixtureRequest) -> MaskGIT:
    torch.manual_seed(0)
    sizes = {"codebook_size": 24, "num_classes": 5, "num_tokens": 12, "dim": 32, "num_heads": 4}
    model = request.param(**sizes, mlp_dim=64, depth=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trajectory(model: MaskGIT, sampling: MaskedSamplingParams, **options) -> list[Tensor]:
    """The canvas before the first step and after every step."""
    canvases = [torch.full((len(LABELS), model.num_tokens), model.mask_token_id)]
    tokens = generate_masked(
        model,
        LABELS,
        streams=ImageStreams.from_seeds(SEEDS),
        sampling=sampling,
        on_step=lambda step, indices: canvases.append(indices),
        **options,
    )
    assert torch.equal(tokens, canvases[-1])
    return canvases


@pytest.mark.parametrize("num_steps", [1, 2, 8, 12, 30])
def test_every_position_is_decided_once_and_never_changes(model: MaskGIT, num_steps: int) -> None:
    canvases = trajectory(model, MaskedSamplingParams(num_steps, softmax_annealing=True))
    assert len(canvases) == num_steps + 1
    for before, after in pairwise(canvases):
        decided = before != model.mask_token_id
        assert torch.equal(after[decided], before[decided])
    assert (canvases[-1] < model.codebook_size).all()
    assert (canvases[-1] >= 0).all()


@pytest.mark.parametrize("num_steps", [8, 30])
def test_all_rows_follow_the_order(model: MaskGIT, num_steps: int) -> None:
    order = ConfidenceOrder(model.num_tokens, steps=num_steps)
    expected = model.num_tokens
    for step, canvas in enumerate(trajectory(model, MaskedSamplingParams(num_steps))[1:]):
        expected = order.num_masked_after(step, expected)
        assert (canvas == model.mask_token_id).sum(dim=-1).tolist() == [expected] * len(LABELS)


def test_equal_confidences_do_not_change_the_counts(model: MaskGIT) -> None:
    with torch.no_grad():
        model.head.weight.zero_()  # every position predicts the same logits
    canvases = trajectory(model, MaskedSamplingParams(4, choice_temperature=0.0))
    assert [int((canvas == model.mask_token_id).sum(dim=-1).max()) for canvas in canvases] == [
        12,
        10,
        8,
        5,
        0,
    ]


@pytest.mark.parametrize(
    "guidance",
    [ConstantGuidance(1.0), ConstantGuidance(3.0), PowerCosineGuidance(5.0)],
    ids=["off", "on", "pow"],
)
def test_an_image_depends_on_its_seed_not_on_its_batch(model: MaskGIT, guidance) -> None:
    sampling = MaskedSamplingParams(6)
    together = trajectory(model, sampling, guidance=guidance)[-1]
    for i, seed in enumerate(SEEDS):
        streams = ImageStreams.from_seeds([seed])
        alone = generate_masked(
            model, LABELS[i : i + 1], streams=streams, sampling=sampling, guidance=guidance
        )
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together[1], together[3])  # the same class with another seed


def test_a_guidance_scale_of_one_computes_one_branch(model: MaskGIT) -> None:
    rows = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    trajectory(model, MaskedSamplingParams(4), guidance=LinearGuidance(4.0))
    assert rows == [4, 8, 8, 8]  # the linear schedule starts at 1.0


def test_predict_applies_the_guidance_formula(model: MaskGIT) -> None:
    indices = torch.full((4, model.num_tokens), model.mask_token_id)
    cond = model(indices, LABELS)
    null = torch.full_like(LABELS, model.null_label)
    uncond = model(indices, null)
    guided = predict(model, indices, LABELS, null, 2.5)
    torch.testing.assert_close(guided, uncond + 2.5 * (cond - uncond), atol=1e-5, rtol=0)
    assert torch.equal(predict(model, indices, LABELS, null, 1.0), cond)
    away = model(indices, null - 1)
    guided = predict(model, indices, LABELS, null - 1, 2.5)
    torch.testing.assert_close(guided, away + 2.5 * (cond - away), atol=1e-5, rtol=0)


def test_no_noise_means_no_randomness(model: MaskGIT) -> None:
    greedy = MaskedSamplingParams(5, choice_temperature=0.0)
    first = generate_masked(model, LABELS, streams=ImageStreams.from_seeds(SEEDS), sampling=greedy)
    other = generate_masked(model, LABELS, streams=ImageStreams.from_seeds([1, 2, 3, 4]), sampling=greedy)
    assert torch.equal(first, other)


def test_temperatures_fall_to_their_end_values() -> None:
    sampling = MaskedSamplingParams(4, choice_temperature=8.0, softmax_annealing=True)
    assert [sampling.noise_at(step) for step in range(4)] == pytest.approx([6, 4, 2, 0])
    assert [sampling.softmax_temperature_at(step) for step in range(4)] == pytest.approx([1.1, 0.9, 0.7, 0.5])
    assert MaskedSamplingParams(4).softmax_temperature_at(0) == 1.0


def test_gumbel_noise_is_finite_and_has_its_mean() -> None:
    assert gumbel(torch.tensor([0.0, 1.0, 1 - 2**-24])).isfinite().all()
    draws = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(draws.mean()) == pytest.approx(0.5772, abs=0.01)  # Euler's constant


def test_schedules_by_name() -> None:
    assert make_guidance("constant", 3.0) == ConstantGuidance(3.0)
    assert make_guidance("linear", 3.0) == LinearGuidance(3.0)
    assert make_guidance("power-cosine", 3.0, 2.0) == PowerCosineGuidance(3.0, 2.0)
    with pytest.raises(ValueError, match="unknown guidance schedule 'cosine'.*power-cosine"):
        make_guidance("cosine", 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"choice_temperature": -1.0}, "choice_temperature must be at least 0, got -1.0"),
        ({"choice_temperature": float("nan")}, "choice_temperature must be at least 0, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedSamplingParams(**options)


@pytest.mark.parametrize("reuse", [None, ContextReuse(2)])
def test_nothing_waits_for_the_device_between_the_steps(model: MaskGIT, reuse: ContextReuse | None) -> None:
    done: list[int] = []
    with contextlib.ExitStack() as steps:

        def watch(step: int, indices: Tensor) -> None:
            done.append(step)
            if step == 0:
                steps.enter_context(no_host_sync())
            if step == 5:
                steps.close()

        generate_masked(
            model,
            LABELS,
            streams=ImageStreams.from_seeds(SEEDS),
            sampling=MaskedSamplingParams(6),
            guidance=LinearGuidance(3.0),
            reuse=reuse,
            on_step=watch,
        )
    assert done == [0, 1, 2, 3, 4, 5]


def test_logits_that_are_not_finite_name_their_step_and_image(model: MaskGIT) -> None:
    calls = []

    def spoil(module, args, output: Tensor) -> Tensor:
        calls.append(1)
        return output if len(calls) < 3 else output.index_fill(0, torch.tensor(1), float("nan"))

    model.register_forward_hook(spoil)
    with pytest.raises(
        ValueError, match="gave NaN or infinity at step 2 of 4, counted from 0, for image 1: are"
    ):
        trajectory(model, MaskedSamplingParams(4))


def test_no_image_is_no_work(model: MaskGIT) -> None:
    tokens = generate_masked(model, LABELS[:0], streams=EmptyStreams(), sampling=MaskedSamplingParams(3))
    assert tokens.shape == (0, model.num_tokens)


class EmptyStreams:
    def uniform(self, *shape: int) -> Tensor:
        return torch.empty(0, *shape)


@pytest.mark.parametrize("labels", [[0, 1, 2, 6], [-1, 0, 1, 2]])
def test_labels_out_of_range_are_refused(model: MaskGIT, labels: list[int]) -> None:
    streams = ImageStreams.from_seeds(SEEDS)
    for wrong in (
        {"class_labels": torch.tensor(labels)},
        {"class_labels": LABELS, "null_labels": torch.tensor(labels)},
    ):
        with pytest.raises(ValueError, match=r"class labels must be in 0\.\.4, or 5 for none; got \["):
            generate_masked(model, streams=streams, **wrong)
