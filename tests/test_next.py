"""One idea of next: for every family and every order, cached steps, training masks and samples follow from the order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.models.generators.test_flex_ar import make_class_model, make_text_model
from tests.models.generators.test_llamagen import make_case as make_llamagen
from tests.models.generators.test_llamagen import make_features, randomise
from tests.models.generators.test_nar import make_case as make_nar
from vistok import AnyOrderAR, TextAR
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Condition, OrderedGenerator, repeat_each
from vistok.models.generators.text_features import TextFeatures

Case = tuple[OrderedGenerator, Condition]  # conditions of two images

ANY_ORDER = [
    ("raster", "sequence", 6),
    ("raster", "3x3", 9),
    ("random-1", "sequence", 6),
    ("random-2", "3x3", 9),
    ("diagonal", "3x4", 12),
    ("diagonal", "2x3x2", 12),
    ("cells-2", "4x4", 16),
    ("interleaved-2", "4x2", 8),
    ("interleaved-2", "2x2x2", 8),
    ("blocks-4", "3x4", 12),
    ("blocks-6", "2x3x2", 12),
    ("scales", "1x1+2x2+3x3", 14),
]


def any_order(order: str, layout: str, num_tokens: int) -> Case:
    model = AnyOrderAR(
        codebook_size=20,
        num_classes=5,
        num_tokens=num_tokens,
        layout=layout,
        order=order,
        dim=32,
        depth=2,
        num_heads=2,
        mlp_dim=24,
    )
    return randomise(model), torch.tensor([3, 5])


def text_ar() -> Case:
    sizes = {"codebook_size": 20, "num_tokens": 6, "dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
    torch.manual_seed(0)
    model = TextAR(text_length=16, **sizes).eval()
    return model, model.encode_text(["a dog", "猫"])


CASES: dict[str, Callable[[], Case]] = {
    "text-ar": text_ar,
    "flex-ar-class": lambda: (make_class_model(), torch.tensor([3, 1])),
    "flex-ar-text": lambda: (make_text_model(), make_features((3, 5))),
    "llamagen-class": lambda: make_llamagen("class"),
    "llamagen-text": lambda: make_llamagen("text"),
    "nar-class": lambda: make_nar("class"),
    "nar-text": lambda: make_nar("text"),
    **{
        f"any-order-{order}-{layout}": lambda order=order, layout=layout, n=n: any_order(order, layout, n)
        for order, layout, n in ANY_ORDER
    },
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def make_indices(model: OrderedGenerator) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.codebook_size, (2, model.num_tokens), generator=generator)


@torch.inference_mode()
def test_cached_steps_equal_the_training_pass(case: Case) -> None:
    model, condition = case
    indices, plan = make_indices(model), model.order.plan()
    cache = model.new_cache(2)
    logits = [model.prefill(condition, cache)]
    before = cache.length
    logits += [model.step(indices[:, positions], cache) for positions in plan[:-1]]
    assert [part.shape[1] for part in logits] == [len(positions) for positions in plan]
    assert cache.length - before == model.num_tokens - len(plan[-1])
    by_position = torch.cat(logits, dim=1)[:, model.order.slots()]
    torch.testing.assert_close(by_position, model(condition, indices), atol=2e-5, rtol=0)


@torch.inference_mode()
def test_a_prediction_sees_exactly_what_was_decided_before_its_step(case: Case) -> None:
    model, condition = case
    indices, may_see = make_indices(model), model.order.prediction_mask()
    logits = model(condition, indices)
    for position in range(model.num_tokens):
        changed = indices.clone()
        changed[:, position] = (indices[:, position] + 7) % model.codebook_size
        change = (model(condition, changed) - logits).abs().amax(dim=-1)  # [b n]
        assert torch.equal(change > 1e-6, may_see[:, position].expand(2, -1))


def one_row(condition: Condition, row: int) -> Condition:
    if isinstance(condition, Tensor):
        return condition[row : row + 1]
    return TextFeatures(condition.features[row : row + 1], condition.keep[row : row + 1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_same_seed_gives_the_same_tokens_at_batch_1_and_16(case: Case, scale: float) -> None:
    model, condition = case

    def draw(batch: Condition, seeds: range) -> Tensor:
        return generate_ordered(
            model,
            batch,
            streams=ImageStreams.from_seeds(seeds),
            guidance=ConstantGuidance(scale),
            null_condition=repeat_each(one_row(condition, 0), len(seeds)),
        ).data

    together = draw(repeat_each(condition, 8), range(16))  # rows 8 and later are the second condition's
    for row in (5, 11):
        alone = draw(one_row(condition, row // 8), range(row, row + 1))
        assert torch.equal(alone[0], together[row])
    assert together.shape == (16, model.num_tokens) and len(together.unique(dim=0)) > 1
