"""AnyOrder: orders per row, steps, shared parameters, inpainting, saving, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.generators.test_llamagen import randomise
from vistok import AnyOrderAR, AnyOrderMasked
from vistok.decoding.given import Given
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.any_order import PRESETS, AnyOrder
from vistok.models.layers.norm import RMSNorm
from vistok.order import DiagonalOrder, GivenFirst, Order, PermutationOrder, RasterOrder

TRUNK = {
    "codebook_size": 20,
    "num_classes": 5,
    "num_tokens": 9,
    "layout": "3x3",
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 24,
}
LABELS = torch.tensor([3, 5])  # the second is "no class"


def make(order: str = "raster", **changes) -> AnyOrderAR:
    return sharpen(AnyOrderAR(order=order, **TRUNK | changes))


def make_masked(**changes) -> AnyOrderMasked:
    return sharpen(AnyOrderMasked(**TRUNK | changes))


def sharpen(model: AnyOrder) -> AnyOrder:
    """Weights large enough for what is drawn to depend on what was decided."""
    randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        model.head.weight.mul_(3)
    return model


def make_indices(num_tokens: int = 9) -> torch.Tensor:
    return torch.randint(20, (2, num_tokens), generator=torch.Generator().manual_seed(0))


def cached_logits(model: AnyOrderAR, indices: torch.Tensor) -> torch.Tensor:
    """Logits `[b n v]` by position, step by step."""
    cache = model.new_cache(len(indices))
    logits = [model.prefill(LABELS[: len(indices)], cache)]
    logits += [model.step(indices[:, positions], cache) for positions in model.order.plan()[:-1]]
    return torch.cat(logits, dim=1)[:, model.order.slots()]


@settings(max_examples=15, deadline=None)
@given(data=st.data(), per_row=st.booleans())
@torch.inference_mode()
def test_any_steps_at_all_can_be_followed(data: st.DataObject, per_row: bool) -> None:
    """Orders nobody has named: every position at a step of its own choice."""
    model, indices = make(), make_indices()
    steps = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 8), min_size=9, max_size=9), min_size=2, max_size=2))
    )
    logits = model(LABELS, indices, order=steps if per_row else steps[0])
    for row in range(2):
        followed = model.with_order(Explicit(9, tuple(steps[row if per_row else 0].tolist())))
        expected = cached_logits(followed, indices)[row]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


class Explicit(Order):
    """An order written down; steps that decide nothing fall away."""

    def __init__(self, num_tokens: int, steps: tuple[int, ...]) -> None:
        object.__setattr__(self, "num_tokens", num_tokens)
        object.__setattr__(self, "steps", steps)

    def __hash__(self) -> int:
        return hash(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Explicit) and other.steps == self.steps

    def decided_at(self) -> torch.Tensor:
        return torch.tensor(self.steps).unique(return_inverse=True)[1]


@torch.inference_mode()
def test_orders_of_each_row_equal_the_same_orders_one_row_at_a_time() -> None:
    model, indices = make(), make_indices()
    orders = [PermutationOrder(9, 1), DiagonalOrder(9, (3, 3))]
    together = model(LABELS, indices, order=torch.stack([order.decided_at() for order in orders]))
    for row, order in enumerate(orders):
        alone = model(LABELS[row : row + 1], indices[row : row + 1], order=order)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=0)
    assert (together - model(LABELS, indices)).abs().max() > 1e-3


@torch.inference_mode()
def test_a_view_in_another_order_shares_the_parameters_and_leaves_the_model_alone() -> None:
    model, indices = make(), make_indices()
    before = model(LABELS, indices)
    diagonal = model.with_order(DiagonalOrder(9, (3, 3)))
    assert all(a is b for a, b in zip(diagonal.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(diagonal(LABELS, indices), cached_logits(diagonal, indices), atol=1e-5, rtol=0)
    assert model.order == RasterOrder(9) and torch.equal(model(LABELS, indices), before)
    assert torch.equal(diagonal(LABELS, indices), make("diagonal")(LABELS, indices))


@pytest.mark.parametrize("order", ["raster", "random-0", "diagonal"])
@torch.inference_mode()
def test_several_steps_can_be_fed_at_once(order: str) -> None:
    model, indices = make(order), make_indices()
    expected = model(LABELS, indices)
    cache, sequence = model.new_cache(2), model.order.sequence()
    model.prefill(LABELS, cache)
    counts = [len(positions) for positions in model.order.plan()]
    several = sum(counts[:3])
    logits = model.step(indices[:, sequence[:several]], cache)
    asked = sequence[counts[0] : several + counts[3]]
    torch.testing.assert_close(logits, expected[:, asked], atol=1e-5, rtol=0)
    assert cache.length == 1 + several


@torch.inference_mode()
def test_a_rolled_back_cache_continues_as_if_nothing_had_been_appended() -> None:
    model = make("diagonal")
    cache = model.new_cache(2)
    model.prefill(LABELS, cache)
    expected = model.step(torch.tensor([[3], [4]]), cache)
    cache.rollback(1)
    model.step(torch.tensor([[7], [8]]), cache)
    cache.rollback(1)
    torch.testing.assert_close(model.step(torch.tensor([[3], [4]]), cache), expected)


@torch.inference_mode()
def test_tokens_that_are_not_whole_steps_are_refused() -> None:
    model = make("diagonal")
    cache = model.new_cache(1)
    with pytest.raises(ValueError, match="the cache is empty: prefill"):
        model.step(torch.zeros(1, 1, dtype=torch.int64), cache)
    model.prefill(LABELS[:1], cache)
    model.step(torch.zeros(1, 1, dtype=torch.int64), cache)
    for number in (0, 1, 3, 4):
        with pytest.raises(ValueError, match=f"step 1 decides 2 tokens, {number} were fed"):
            model.step(torch.zeros(1, number, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="nothing follows 9 tokens"):
        model.step(torch.zeros(1, 8, dtype=torch.int64), cache)
    assert cache.length == 2  # nothing of this was kept


@torch.inference_mode()
def test_a_small_cache_is_for_few_tokens() -> None:
    model, indices = make(), make_indices()
    expected, cache = model(LABELS, indices), model.new_cache(2, num_tokens=3)
    model.prefill(LABELS, cache)
    torch.testing.assert_close(model.step(indices[:, :2], cache), expected[:, 1:3], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="the cache holds 4 positions, 5 were asked for"):
        model.step(indices[:, 2:4], cache)
    short = generate_ordered(model, LABELS, streams=ImageStreams.from_seeds([0, 1]), num_tokens=3)
    whole = generate_ordered(model, LABELS, streams=ImageStreams.from_seeds([0, 1]))
    assert torch.equal(short.data, whole.data[:, :3])


@pytest.mark.parametrize("order", ["raster", "random-0", "cells-3"])
@torch.inference_mode()
def test_a_prediction_knows_its_place_and_its_class(order: str) -> None:
    model = make(order)
    logits = model(LABELS, torch.zeros(2, 9, dtype=torch.int64))
    assert (logits[0] - logits[1]).abs().amin(dim=0).max() > 1e-3
    first = logits[0, model.order.plan()[0]]
    assert len(first.unique(dim=0)) == len(first)  # all see the class alone, each from elsewhere


def test_channels_that_the_axes_cannot_share_are_not_rotated() -> None:
    model = make(layout="1x3x3", dim=40)  # heads of 20 channels, of which three axes share 18
    cos, sin = model.rotation(torch.arange(10))
    assert cos.shape == sin.shape == (10, 10)
    assert (cos[0] == 1).all() and (sin[0] == 0).all()  # the class
    assert (cos[:, 9] == 1).all() and (sin[:, 9] == 0).all()
    assert (sin[2:, 8] != 0).any()


@torch.inference_mode()
def test_given_tokens_stay_and_what_is_drawn_follows_from_those_that_lie_later() -> None:
    model, indices = make(), make_indices()
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[:, 6:] = True  # the last row of the grid
    inpainting = model.with_order(GivenFirst(9, RasterOrder(9), given=(6, 7, 8)))
    other = indices.clone()
    other[:, 6:] = (indices[:, 6:] + 7) % 20

    def draw(model: AnyOrderAR, tokens: torch.Tensor) -> torch.Tensor:
        return generate_ordered(
            model,
            LABELS,
            streams=ImageStreams.from_seeds([0, 1]),
            sampling=SamplingParams(top_k=1),
            given=Given(tokens, keep),
        ).data

    for tokens in (indices, other):
        assert torch.equal(draw(inpainting, tokens)[:, 6:], tokens[:, 6:])
    assert not torch.equal(draw(inpainting, indices)[:, :6], draw(inpainting, other)[:, :6])
    assert torch.equal(draw(model, indices)[:, :6], draw(model, other)[:, :6])  # raster cannot know


def test_both_classes_have_the_same_parameters() -> None:
    causal, masked = make(qk_norm=True), make_masked(qk_norm=True)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (causal, masked)]
    assert shapes[0] == shapes[1]
    masked.load_state_dict(causal.state_dict(), strict=True)


@torch.inference_mode()
def test_masks_are_seen_as_masks_and_every_token_counts() -> None:
    model, indices = make_masked(), make_indices()
    indices[:, 4] = model.mask_token_id
    logits = model(indices, LABELS)
    assert logits.shape == (2, 9, 20)
    for position in range(9):
        changed = indices.clone()
        changed[:, position] = (indices[:, position] + 1) % 20
        assert ((model(changed, LABELS) - logits).abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("guidance", [ConstantGuidance(1.0), ConstantGuidance(3.0)])
def test_masked_images_do_not_depend_on_the_batch(guidance: ConstantGuidance) -> None:
    model, labels = make_masked(), torch.arange(16) % 5
    options = {"guidance": guidance, "sampling": MaskedSamplingParams(num_steps=4)}
    together = generate_masked(model, labels, streams=ImageStreams.from_seeds(range(16)), **options)
    alone = generate_masked(model, labels[6:7], streams=ImageStreams.from_seeds([6]), **options)
    assert torch.equal(alone[0], together[6]) and len(together.unique(dim=0)) > 1


@pytest.mark.parametrize("kind", [AnyOrderAR, AnyOrderMasked])
def test_every_parameter_gets_a_gradient_and_dropout_only_acts_in_training(kind: type) -> None:
    model = sharpen(kind(**TRUNK, qk_norm=True, dropout=0.5)).train()
    indices = make_indices()
    inputs = (
        (LABELS, indices) if kind is AnyOrderAR else (indices.index_fill(1, torch.tensor([2]), 20), LABELS)
    )
    model(*inputs).log_softmax(dim=-1)[..., 0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


def test_a_model_that_has_drawn_can_be_trained() -> None:
    model = make("random-9")  # what is kept between calls was made in inference mode
    generate_ordered(model, LABELS, streams=ImageStreams.from_seeds([0, 1]))
    model(LABELS, make_indices()).sum().backward()


@pytest.mark.parametrize("kind", [AnyOrderAR, AnyOrderMasked])
@torch.inference_mode()
def test_save_and_load_are_bit_exact(kind: type, tmp_path) -> None:
    order = {"order": "diagonal"} if kind is AnyOrderAR else {}
    model = sharpen(kind(**TRUNK, **order))
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert loaded.layout == model.layout and loaded.config["layout"] == "3x3"
    if kind is AnyOrderAR:
        assert loaded.order == DiagonalOrder(9, (3, 3))
        # The mapped file lies otherwise in memory, and matrix kernels choose their order of sums by that.
        torch.testing.assert_close(
            loaded(LABELS, make_indices()), model(LABELS, make_indices()), atol=1e-5, rtol=0
        )


def test_half_precision_keeps_positions_exact() -> None:
    model = make()
    expected = model.rotation(torch.arange(10))
    halved = model.to(torch.bfloat16)
    for before, after in zip(expected, halved.rotation(torch.arange(10)), strict=True):
        assert after.dtype == torch.float32 and torch.equal(before, after)
    assert halved(LABELS, make_indices()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", [AnyOrderAR, AnyOrderMasked])
def test_presets_are_sizes_of_both_classes(name: str, kind: type) -> None:
    with torch.device("meta"):
        model = kind(**PRESETS[name])
    assert len(model.blocks) == PRESETS[name]["depth"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "diagonal", "layout": "sequence"}, "needs tokens on a grid, these are a sequence"),
        ({"order": "scales"}, "needs tokens in several scales, these are a 3x3"),
        ({"order": "cells-2"}, r"a grid \[3, 3\] cannot be cut into cells of 2"),
        ({"order": "blocks-4"}, "9 tokens cannot be cut into blocks of 4"),
        ({"order": "spiral"}, "unknown order 'spiral'"),
        ({"layout": "4x4"}, "a layout 4x4 has 16 positions, not 9"),
        ({"layout": "1x1+2x2"}, r"a layout 1x1\+2x2 has 5 positions, not 9"),
        ({"layout": "1x3x3", "num_heads": 8}, "heads of 4 channels cannot be rotated over the 3 axes"),
        ({"dim": 30}, "heads of 15 channels cannot be rotated"),
        ({"num_heads": 3}, "heads of 10 channels|not a multiple of num_heads"),
        ({"codebook_size": 0}, "codebook_size must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyOrderAR(**TRUNK | changes)


@torch.inference_mode()
def test_bad_input_is_refused() -> None:
    model, masked, indices = make(), make_masked(), make_indices()
    for call in (
        lambda labels, indices: model(labels, indices),
        lambda labels, indices: masked(indices, labels),
    ):
        with pytest.raises(ValueError, match=r"takes indices \[b 9\], got \[2, 8\]"):
            call(LABELS, indices[:, :8])
        with pytest.raises(ValueError, match=r"class labels must be \[2\], got \[1\]"):
            call(LABELS[:1], indices)
    for label in (-1, 6):  # those of a masked generator are checked by its loop
        with pytest.raises(ValueError, match=r"class labels must be in 0\.\.4, or 5 for none"):
            model(torch.tensor([0, label]), indices)
    with pytest.raises(ValueError, match=r"an order must be \[9\] or \[2 9\] steps, got \[1, 9\]"):
        model(LABELS, indices, order=torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="this model has 9 tokens, the order has 4"):
        model.with_order(RasterOrder(4))
