"""Context reuse in the masked loop: what a cheap evaluation computes, when evaluations are full, how far it is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.generators.test_any_order import sharpen
from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.given import Given
from vistok.decoding.guidance import ConstantGuidance, LinearGuidance, StepsGuidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked, predict, undecided
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.any_order import AnyOrderMasked
from vistok.models.generators.base import MaskedGenerator
from vistok.models.generators.maskgit import MaskGITBert, MaskGITUViT

SIZES: dict[str, Any] = {"codebook_size": 24, "num_classes": 5, "num_tokens": 12, "dim": 32, "num_heads": 4}
LABELS = torch.tensor([0, 4, 2, 4])
SEEDS = [5, 6, 7, 8]
SAMPLING = MaskedSamplingParams(8, choice_temperature=1.0)
FAMILIES = ["bert", "uvit", "any-order"]


def make(family: str, depth: int = 2) -> MaskedGenerator:
    torch.manual_seed(0)
    if family == "any-order":
        return sharpen(AnyOrderMasked(**SIZES, mlp_dim=48, depth=depth, layout="3x4")).eval()
    kind = {"bert": MaskGITBert, "uvit": MaskGITUViT}[family]
    model = kind(**SIZES, mlp_dim=64, depth=depth).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> MaskedGenerator:
    return make(request.param)


def canvases(model: MaskedGenerator, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A canvas `[3 n]`, one with more tokens decided, and the positions `[3 6]` undecided in the first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.codebook_size, (3, model.num_tokens), generator=generator)
    order = torch.rand(3, model.num_tokens, generator=generator).argsort(dim=1)
    before = tokens.scatter(1, order[:, :6], model.mask_token_id)
    after = tokens.scatter(1, order[:, :2], model.mask_token_id)
    return before, after, order[:, :6].sort(dim=1).values


def cheap_logits(model: MaskedGenerator, before: Tensor, after: Tensor, live: Tensor) -> Tensor:
    """Logits `[b k v]` of a cheap evaluation of `after` that follows a full one of `before`."""
    cache = model.new_cache(len(before))
    full = model(before, LABELS[:3], cache.evaluate_all(len(before)))
    assert torch.equal(full, model(before, LABELS[:3]))  # keeping features changes nothing
    return model(after, LABELS[:3], cache.evaluate(live))


def at(logits: Tensor, positions: Tensor) -> Tensor:
    """`[b n v]` at `positions [b k]`."""
    return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


@torch.no_grad()
def frozen_logits(model: MaskedGenerator, before: Tensor, after: Tensor, live: Tensor) -> Tensor:
    """The definition of a cheap evaluation: a plain one in which all other positions keep their keys and values."""
    is_kept = torch.ones(3, 1 + model.num_tokens, 1, dtype=torch.bool).scatter(1, 1 + live[..., None], False)
    is_kept[:, 0] = False  # the class is computed anew
    projections = [m for name, m in model.named_modules() if name.endswith(("qkv", "key", "value"))]
    seen: dict[Any, Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, args, output: seen.update({m: output})) for m in projections]
    model(before, LABELS[:3])
    kept = dict(seen)
    hooks += [
        m.register_forward_hook(lambda m, args, output: torch.where(is_kept, kept[m], output))
        for m in projections
    ]
    logits = model(after, LABELS[:3])
    for hook in hooks:
        hook.remove()
    return at(logits, live)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cheap_evaluation_is_a_plain_one_with_the_context_kept(family: str, depth: int) -> None:
    model = make(family, depth)
    before, after, live = canvases(model)
    cheap = cheap_logits(model, before, after, live)
    torch.testing.assert_close(cheap, frozen_logits(model, before, after, live), atol=1e-4, rtol=1e-4)
    error = (cheap - at(model(after, LABELS[:3]), live)).abs().max()
    assert error > 1e-3  # of several layers, so that the above says something


@pytest.mark.parametrize(("family", "depth"), [("bert", 1), ("uvit", 0), ("any-order", 1)])
@torch.no_grad()
def test_with_one_layer_a_cheap_evaluation_is_a_full_one(family: str, depth: int) -> None:
    """A position's keys and values in the first layer depend on its own token alone."""
    model = make(family, depth)
    before, after, live = canvases(model)
    expected = at(model(after, LABELS[:3]), live)
    torch.testing.assert_close(cheap_logits(model, before, after, live), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cheap_evaluations_follow_each_other(model: MaskedGenerator) -> None:
    before, after, live = canvases(model)
    cache = model.new_cache(3)
    model(before, LABELS[:3], cache.evaluate_all(3))
    model(canvases(model, seed=1)[0], LABELS[:3], cache.evaluate(live))  # leaves nothing behind
    again = model(after, LABELS[:3], cache.evaluate(live))
    torch.testing.assert_close(again, cheap_logits(model, before, after, live), atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_is_seen_by_nobody(model: MaskedGenerator) -> None:
    before, after, live = canvases(model)
    padded = torch.cat([live, torch.full((3, 2), model.num_tokens)], dim=1)
    logits = cheap_logits(model, before, after, padded)
    torch.testing.assert_close(logits[:, :6], cheap_logits(model, before, after, live), atol=1e-5, rtol=0)


def test_undecided_positions_are_padded_to_the_longest_row() -> None:
    is_masked = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    assert undecided(is_masked, most=2).tolist() == [[1, 3], [0, 4], [4, 4]]
    assert undecided(torch.zeros(2, 3, dtype=torch.bool), most=0).shape == (2, 0)


def draw(model: MaskedGenerator, reuse: ContextReuse | None, rows: slice = slice(None), **options) -> Tensor:
    streams = ImageStreams.from_seeds(SEEDS[rows])
    options = {"sampling": SAMPLING} | options
    return generate_masked(model, LABELS[rows], streams=streams, reuse=reuse, **options)


@pytest.mark.parametrize("guidance", [ConstantGuidance(1.0), LinearGuidance(3.0)], ids=["off", "on"])
def test_full_evaluations_alone_change_nothing(model: MaskedGenerator, guidance, monkeypatch) -> None:
    plain = draw(model, None, guidance=guidance)
    warm = draw(model, ContextReuse(2, warm_up=8), guidance=guidance)
    assert torch.equal(warm, plain)
    monkeypatch.setattr(type(model), "new_cache", None)  # a period of 1 does not touch it
    assert torch.equal(draw(model, ContextReuse(1), guidance=guidance), plain)


@pytest.mark.parametrize("guidance", [ConstantGuidance(1.0), ConstantGuidance(3.0)], ids=["off", "on"])
def test_an_image_depends_on_its_seed_not_on_its_batch(model: MaskedGenerator, guidance) -> None:
    tokens = torch.randint(24, (4, 12), generator=torch.Generator().manual_seed(3))
    keep = torch.arange(12) < torch.tensor(
        [[0], [5], [12], [9]]
    )  # rows with different numbers of undecided ones
    for given in (None, Given(tokens, keep)):
        together = draw(model, ContextReuse(3), guidance=guidance, given=given)
        assert ((together >= 0) & (together < model.codebook_size)).all()
        if given is not None:
            assert torch.equal(together[keep], tokens[keep])
        for i in range(4):
            rows = slice(i, i + 1)
            alone = None if given is None else Given(tokens[rows], keep[rows])
            row = draw(model, ContextReuse(3), rows, guidance=guidance, given=alone)
            assert torch.equal(row[0], together[i])


def test_the_loop_uses_cheap_logits_where_the_schedule_says_so(model: MaskedGenerator) -> None:
    """Replays the canvases with evaluations made by hand."""
    canvas = [torch.full((4, 12), model.mask_token_id)]
    logits: list[Tensor] = []

    def keep_logits(values: Tensor) -> Tensor:
        logits.append(values)
        return values

    draw(
        model,
        ContextReuse(3, warm_up=1),
        guidance=ConstantGuidance(2.0),
        logits_processor=keep_logits,
        on_step=lambda step, indices: canvas.append(indices),
    )
    null = torch.full_like(LABELS, model.null_label)
    cache, live = model.new_cache(8), torch.empty(0)
    for step, (indices, values) in enumerate(zip(canvas[:-1], logits, strict=True)):
        is_masked = indices == model.mask_token_id
        if step in (0, 1, 4, 7):
            expected = predict(model, indices, LABELS, null, 2.0)
            live = undecided(is_masked, int(is_masked.sum(dim=1).max()))
            with torch.no_grad():
                model(indices.repeat(2, 1), torch.cat([LABELS, null]), cache.evaluate_all(8))
            torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
            continue
        with torch.no_grad():
            both = model(indices.repeat(2, 1), torch.cat([LABELS, null]), cache.evaluate(live.repeat(2, 1)))
        expected = both[4:] + 2.0 * (both[:4] - both[4:])
        torch.testing.assert_close(at(values, live), expected, atol=1e-4, rtol=0)
        assert not values.masked_fill(
            torch.zeros(4, 12, dtype=torch.bool).scatter(1, live, True)[..., None], 0
        ).any()


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (ConstantGuidance(1.0), [4, 4, 4, 4, 4, 4, 4, 4]),
        (ConstantGuidance(2.0), [8, 8, 8, 8, 8, 8, 8, 8]),
        (StepsGuidance(2.0, 4), [8, 8, 8, 8, 4, 4, 4, 4]),
        (StepsGuidance(2.0, 5), [8, 8, 8, 8, 8, 4, 4, 4]),
        (
            LinearGuidance(2.0),
            [8, 8, 8, 8, 8, 8, 8, 8],
        ),  # off at step 0, but the next one is cheap and guided
    ],
)
def test_the_unconditional_branch_is_computed_where_it_is_needed(
    model: MaskedGenerator, guidance, expected: list[int]
) -> None:
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    draw(model, ContextReuse(2), guidance=guidance)
    assert rows == expected


def test_a_cheap_evaluation_computes_no_more_than_what_was_undecided(model: MaskedGenerator) -> None:
    sizes: list[int] = []
    model.head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    canvas: list[Tensor] = []
    draw(model, ContextReuse(4), on_step=lambda step, indices: canvas.append(indices))
    left = [12, *((indices[0] == model.mask_token_id).sum().item() for indices in canvas)]
    assert sizes == [12, 12, 12, 12, 12, left[4], left[4], left[4]]
    assert left[4] < 12


def divergence(model: MaskedGenerator, reuse: ContextReuse) -> float:
    """Mean KL divergence of the cheap logits from full ones at the same canvases, over undecided positions."""
    canvas = [torch.full((32, 12), model.mask_token_id)]
    labels = torch.arange(32) % 5
    values: list[Tensor] = []

    def compare(logits: Tensor) -> Tensor:
        is_masked = canvas[-1] == model.mask_token_id
        full = predict(model, canvas[-1], labels, labels, 1.0)[is_masked].log_softmax(dim=-1)
        cheap = logits[is_masked].log_softmax(dim=-1)
        values.append((full.exp() * (full - cheap)).sum(dim=-1))
        return logits

    generate_masked(
        model,
        labels,
        streams=ImageStreams.from_seeds(range(32)),
        sampling=MaskedSamplingParams(12, choice_temperature=1.0),
        reuse=reuse,
        logits_processor=compare,
        on_step=lambda step, indices: canvas.append(indices),
    )
    return float(torch.cat(values).mean())


def test_the_error_falls_with_the_period_and_with_warm_up(model: MaskedGenerator) -> None:
    schedules = (ContextReuse(2, 12), ContextReuse(2, 6), ContextReuse(2), ContextReuse(4), ContextReuse(12))
    errors = [divergence(model, reuse) for reuse in schedules]
    assert errors[0] < 1e-9
    # From step 0 to the end everything is undecided at the only full evaluation: nothing is kept.
    assert errors[-1] < 1e-9
    assert errors[0] < errors[1] <= errors[2] < errors[3]


def test_a_generator_without_such_a_cache_is_named() -> None:
    class Plain(MaskGITBert):
        new_cache = MaskedGenerator.new_cache

    with pytest.raises(NotImplementedError, match=r"Plain does not define new_cache\(\).*a period of 1"):
        draw(Plain(**SIZES, depth=1), ContextReuse(2))


def test_a_cache_has_rows_enough_or_says_so(model: MaskedGenerator) -> None:
    with pytest.raises(ValueError, match="the cache has 2 rows, 3 were asked for"):
        model.new_cache(2).evaluate_all(3)
