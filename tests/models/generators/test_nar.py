"""NAR: merging of the heads, diagonals in the cache, what a prediction may see, bad input."""

from __future__ import annotations

import pytest
import torch

from tests.models.generators.test_llamagen import SMALL, TEXT, make_features, make_indices, randomise
from vistok import NARClass, NARText
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Condition
from vistok.models.generators.nar import NAR, merge_heads


def make_case(kind: str, **changes: int) -> tuple[NAR, Condition]:
    """A model, and conditions of two images."""
    if kind == "class":
        return randomise(NARClass(num_classes=5, **SMALL | changes)), torch.tensor([3, 5])
    return randomise(NARText(**TEXT, **SMALL | changes)), make_features((2, 5))


@pytest.fixture(params=["class", "text"])
def case(request: pytest.FixtureRequest) -> tuple[NAR, Condition]:
    return make_case(request.param)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("changes", [{}, {"num_tokens": 25}, {"num_tokens": 1}, {"num_kv_heads": 1}])
@torch.inference_mode()
def test_cached_steps_equal_the_training_pass(kind: str, changes: dict) -> None:
    model, condition = make_case(kind, **changes)
    indices, plan = make_indices(model.num_tokens), model.order.plan()
    grid = int(model.num_tokens**0.5)
    assert len(plan) == 2 * grid - 1
    cache = model.new_cache(2)
    logits = [model.prefill(condition, cache)]
    logits += [model.step(indices[:, positions], cache) for positions in plan[:-1]]
    assert [part.shape[1] for part in logits] == [len(positions) for positions in plan]
    expected = model(condition, indices)[:, model.order.sequence()]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_prediction_depends_on_all_diagonals_before_its_own_and_on_no_other(case) -> None:
    model, condition = case
    indices = make_indices(9)
    logits, may_see = model(condition, indices), model.order.prediction_mask()
    for position in range(9):
        changed = indices.clone()
        changed[:, position] = (indices[:, position] + 1) % 20
        differs = (model(condition, changed) != logits).any(dim=-1)  # [b n]
        assert torch.equal(differs, may_see[:, position].expand(2, -1))


def test_heads_are_merged_as_the_neighbours_lie() -> None:
    """Against the table of the paper, written out position by position, on a grid of 3 x 3."""
    generator = torch.Generator().manual_seed(0)
    right, below = torch.randn(2, 1, 3, 3, 4, generator=generator)  # [b row column v] of every token
    start_right, start_below = torch.randn(2, 1, 1, 4, generator=generator)
    assert torch.equal(merge_heads(start_right, start_below, 0, 3), (start_right + start_below) / 2)
    for step in range(1, 5):
        fed = [(r, step - 1 - r) for r in range(3) if 0 <= step - 1 - r < 3]
        rights = torch.stack([right[:, r, c] for r, c in fed], dim=1)
        belows = torch.stack([below[:, r, c] for r, c in fed], dim=1)
        expected = []
        for r in range(3):
            c = step - r
            if not 0 <= c < 3:
                continue
            said = [right[:, r, c - 1]] if c else []
            said += [below[:, r - 1, c]] if r else []
            expected.append(sum(said) / len(said))
        assert torch.equal(merge_heads(rights, belows, step, 3), torch.stack(expected, dim=1))


@torch.inference_mode()
def test_the_head_for_below_reads_one_block_more(case) -> None:
    model, condition = case
    indices = make_indices(9)
    right, below = model.head_logits(condition, indices)
    for parameter in model.blocks[-1].parameters():
        parameter.zero_()
    same, other = model.head_logits(condition, indices)
    assert torch.equal(same, right) and not torch.allclose(other, below)


@torch.inference_mode()
def test_a_rolled_back_cache_continues_as_if_nothing_had_been_appended(case) -> None:
    model, condition = case
    cache = model.new_cache(2)
    model.prefill(condition, cache)
    length = cache.length
    expected = model.step(torch.tensor([[3], [4]]), cache)
    cache.rollback(length)
    assert not torch.allclose(model.step(torch.tensor([[5], [6]]), cache), expected)
    cache.rollback(length)
    torch.testing.assert_close(model.step(torch.tensor([[3], [4]]), cache), expected)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_an_image_needs_as_many_forwards_as_diagonals(kind: str, monkeypatch) -> None:
    model, condition = make_case(kind)
    fed: list[int] = []
    step = model.step
    monkeypatch.setattr(
        model, "step", lambda indices, cache: fed.append(indices.shape[1]) or step(indices, cache)
    )
    tokens = generate_ordered(
        model, condition, streams=ImageStreams.from_seeds([0, 1]), guidance=ConstantGuidance(3.0)
    )
    assert tokens.data.shape == (2, 9) and str(tokens.layout) == "3x3"
    assert fed == [1, 2, 3, 2]  # besides the prefill; the last token is never fed


@torch.inference_mode()
def test_logits_are_float32_whatever_the_weights_are(case) -> None:
    model, condition = case
    indices = make_indices(9)
    expected = model(condition, indices)
    model.to(torch.bfloat16)
    logits = model(condition, indices)
    assert logits.dtype == model.prefill(condition, model.new_cache(2)).dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.2, rtol=0)


def test_every_parameter_gets_a_gradient(case) -> None:
    model, condition = case
    model(condition, make_indices(9)).log_softmax(dim=-1)[..., 0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_only_the_head_for_the_right_starts_at_zero() -> None:
    right, below = NARClass(num_classes=5, **SMALL).head_logits(torch.tensor([1, 2]), make_indices(9))
    assert not right.any() and below.any()


def test_save_and_load_are_bit_exact(case, tmp_path) -> None:
    model, condition = case
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(condition, make_indices(9)), model(condition, make_indices(9)))


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (2,)])
def test_wrong_numbers_of_tokens_are_refused(case, shape: tuple) -> None:
    model, condition = case
    with pytest.raises(ValueError, match=r"indices must be \[b 9\], got \["):
        model(condition, torch.zeros(shape, dtype=torch.int64))


@torch.inference_mode()
def test_steps_take_whole_diagonals_and_end_with_the_last(case) -> None:
    model, condition = case
    indices, plan = make_indices(9), model.order.plan()
    cache = model.new_cache(2)
    model.prefill(condition, cache)
    model.step(indices[:, plan[0]], cache)
    with pytest.raises(ValueError, match="step 1 decides 2 tokens, 1 were fed"):
        model.step(indices[:, :1], cache)
    for positions in plan[1:-1]:
        model.step(indices[:, positions], cache)
    with pytest.raises(ValueError, match="all 9 tokens are decided"):
        model.step(indices[:, plan[-1]], cache)


@torch.inference_mode()
def test_a_small_cache_is_refused_when_it_is_full(case) -> None:
    model, condition = case
    cache = model.new_cache(2, num_tokens=2)
    model.prefill(condition, cache)
    model.step(make_indices(1), cache)
    most = model.prefix.length + 2
    with pytest.raises(ValueError, match=f"holds {most} positions, {most + 1} were asked for"):
        model.step(make_indices(2), cache)


def test_grids_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens 12 does not make a square grid; 9 and 16 do"):
        NARClass(**SMALL | {"num_tokens": 12})
