"""Orders: what follows from the step at which each position is decided, over random grids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.order import (
    BlockOrder,
    CellOrder,
    ConfidenceOrder,
    DiagonalOrder,
    GivenFirst,
    InterleavedOrder,
    Order,
    PermutationOrder,
    RasterOrder,
    ScaleOrder,
    make_order,
)
from vistok.tokens import Layout

several = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 3)
grids = st.lists(sizes, min_size=2, max_size=3).map(tuple)


@st.composite
def fixed_orders(draw: st.DrawFn) -> Order:
    """Any order with fixed steps, over a random number of tokens."""
    grid, factor = draw(grids), draw(st.integers(1, 2))
    fine = tuple(factor * size for size in grid)
    scales = tuple(draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4)))
    order = draw(
        st.sampled_from(
            [
                RasterOrder(math.prod(grid)),
                PermutationOrder(math.prod(grid), seed=factor),
                BlockOrder(math.prod(fine), math.prod(grid)),
                DiagonalOrder(math.prod(grid), grid),
                CellOrder(math.prod(fine), fine, factor),
                InterleavedOrder(math.prod(fine), fine, factor),
                ScaleOrder(sum(h * w for h, w in scales), scales),
            ]
        )
    )
    given_first = draw(st.sets(st.integers(0, order.num_tokens - 1), max_size=5))
    return draw(st.sampled_from([order, GivenFirst(order.num_tokens, order, tuple(given_first))]))


@several
@given(fixed_orders())
def test_every_position_is_decided_exactly_once(order: Order) -> None:
    plan, steps = order.plan(), order.decided_at().tolist()
    assert len(plan) == order.num_steps
    assert sorted(torch.cat(plan).tolist()) == list(range(order.num_tokens))
    for step, positions in enumerate(plan):
        assert len(positions) and positions.tolist() == sorted(positions.tolist())
        assert all(steps[position] == step for position in positions)


@several
@given(fixed_orders())
def test_sequence_slots_and_plan_agree(order: Order) -> None:
    assert torch.equal(order.sequence(), torch.cat(order.plan()))
    assert torch.equal(order.sequence()[order.slots()], torch.arange(order.num_tokens))


@several
@given(fixed_orders())
def test_masks_follow_from_the_steps(order: Order) -> None:
    steps, n = order.decided_at().tolist(), order.num_tokens
    prediction, context = order.prediction_mask(), order.context_mask()
    assert prediction.tolist() == [[steps[k] < steps[q] for k in range(n)] for q in range(n)]
    assert context.tolist() == [[steps[k] <= steps[q] for k in range(n)] for q in range(n)]


@several
@given(fixed_orders())
def test_in_the_order_of_the_cache_a_prediction_sees_what_lies_before_its_own_step(order: Order) -> None:
    sequence, decided = order.sequence(), 0
    prediction = order.prediction_mask()[sequence][:, sequence]
    context = order.context_mask()[sequence][:, sequence]
    for positions in order.plan():
        rows = slice(decided, decided + len(positions))
        assert prediction[rows].sum(dim=1).tolist() == [decided] * len(positions)
        assert prediction[rows, :decided].all()
        decided += len(positions)
        assert context[rows].sum(dim=1).tolist() == [decided] * len(positions)
        assert context[rows, :decided].all()


@several
@given(fixed_orders(), st.integers(0, 60))
def test_steps_within_a_number_of_tokens_are_those_that_begin_there(order: Order, num_tokens: int) -> None:
    plan = order.plan()
    begin = [sum(map(len, plan[:step])) for step in range(len(plan))]
    assert order.num_steps_within(num_tokens) == sum(start <= num_tokens for start in begin)


@several
@given(grids)
def test_a_diagonal_has_one_coordinate_sum(grid: tuple[int, ...]) -> None:
    order = DiagonalOrder(math.prod(grid), grid)
    places = Layout(grid).coordinates(order.num_tokens)
    assert order.num_steps == sum(size - 1 for size in grid) + 1
    for step, positions in enumerate(order.plan()):
        assert (places[positions].sum(dim=1) == step).all()


@several
@given(grids, st.integers(1, 3))
def test_a_cell_is_a_block_of_neighbours_and_a_subsample_is_spread_out(grid: tuple[int, ...], k: int) -> None:
    fine = tuple(k * size for size in grid)
    places = Layout(fine).coordinates(math.prod(fine))
    cells, subsamples = CellOrder(len(places), fine, k), InterleavedOrder(len(places), fine, k)
    assert (cells.num_steps, subsamples.num_steps) == (math.prod(grid), k ** len(grid))
    for positions in cells.plan():
        extent = places[positions].amax(dim=0) - places[positions].amin(dim=0)
        assert extent.tolist() == [k - 1] * len(grid)
    for positions in subsamples.plan():
        assert len((places[positions] % k).unique(dim=0)) == 1
        assert len(positions) == math.prod(grid)


def test_cells_and_subsamples_go_row_by_row() -> None:
    cells = CellOrder(16, (4, 4), 2).decided_at().view(4, 4)
    assert cells.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    subsamples = InterleavedOrder(16, (4, 4), 2).decided_at().view(4, 4)
    assert subsamples.tolist() == [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]]


def test_scales_and_blocks_are_decided_in_storage_order() -> None:
    assert ScaleOrder(6, ((1, 1), (1, 2), (1, 3))).decided_at().tolist() == [0, 1, 1, 2, 2, 2]
    assert BlockOrder(6, 3).decided_at().tolist() == [0, 0, 0, 1, 1, 1]


def test_a_permutation_follows_from_its_seed() -> None:
    drawn = [PermutationOrder(20, seed).decided_at() for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_given_positions_come_first_and_the_others_keep_their_order() -> None:
    order = GivenFirst(6, RasterOrder(6), given=(4, 1))
    assert [positions.tolist() for positions in order.plan()] == [[1, 4], [0], [2], [3], [5]]
    diagonal = GivenFirst(4, DiagonalOrder(4, (2, 2)), given=(1, 2))  # the middle diagonal, which falls away
    assert [positions.tolist() for positions in diagonal.plan()] == [[1, 2], [0], [3]]
    assert torch.equal(GivenFirst(6, RasterOrder(6)).decided_at(), torch.arange(6))
    assert GivenFirst(2, RasterOrder(2), given=(0, 1)).num_steps == 1


@pytest.mark.parametrize("num_tokens", [1, 5, 32, 128, 256])
@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_confidence_order_ends_with_nothing_masked_and_decides_something_at_each_step(num_tokens, steps):
    order = ConfidenceOrder(num_tokens, steps)
    masked = num_tokens
    for step in range(steps):
        left = order.num_masked_after(step, masked)
        assert left < masked or masked == 1  # the last masked position waits for the last step
        masked = left
    assert masked == 0


@pytest.mark.parametrize(
    ("name", "num_tokens", "layout", "expected"),
    [
        ("raster", 4, Layout(), RasterOrder(4)),
        ("raster", 4, Layout((2, 2)), RasterOrder(4)),
        ("diagonal", 6, Layout((2, 3)), DiagonalOrder(6, (2, 3))),
        ("diagonal", 12, Layout((2, 2, 3)), DiagonalOrder(12, (2, 2, 3))),
        ("cells-2", 16, Layout((4, 4)), CellOrder(16, (4, 4), 2)),
        ("interleaved-2", 16, Layout((4, 4)), InterleavedOrder(16, (4, 4), 2)),
        ("scales", 5, Layout(scales=((1, 1), (2, 2))), ScaleOrder(5, ((1, 1), (2, 2)))),
        ("blocks-3", 6, Layout((2, 3)), BlockOrder(6, 3)),
        ("random-7", 6, Layout(), PermutationOrder(6, 7)),
    ],
)
def test_orders_are_made_by_name(name: str, num_tokens: int, layout: Layout, expected: Order) -> None:
    assert make_order(name, num_tokens, layout) == expected


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("spiral", Layout(), "unknown order 'spiral'; known: raster, diagonal"),
        ("cells", Layout((4, 4)), "unknown order 'cells'"),
        ("cells-x", Layout((4, 4)), "unknown order 'cells-x'"),
        ("raster-2", Layout(), "unknown order 'raster-2'"),
        ("raster-", Layout(), "unknown order 'raster-'"),
        ("diagonal", Layout(), "needs tokens on a grid, these are a sequence"),
        ("diagonal", Layout(scales=((2, 2), (4, 4))), "needs tokens on a grid"),
        ("diagonal", Layout((4, 5)), r"a grid \[4, 5\] does not have 16 positions"),
        ("cells-3", Layout((4, 4)), r"a grid \[4, 4\] cannot be cut into cells of 3"),
        ("cells-0", Layout((4, 4)), "cannot be cut into cells of 0"),
        ("interleaved-3", Layout((4, 4)), "cannot be cut into strides of 3"),
        ("blocks-5", Layout((4, 4)), "16 tokens cannot be cut into blocks of 5"),
        ("scales", Layout((4, 4)), "needs tokens in several scales, these are a 4x4"),
        ("scales", Layout(scales=((1, 1), (2, 2))), "do not have 16 positions together"),
    ],
)
def test_orders_that_do_not_fit_are_refused(name: str, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_order(name, 16, layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RasterOrder(0), "at least one"),
        (lambda: ConfidenceOrder(4, 0), "at least one"),
        (lambda: GivenFirst(4, RasterOrder(5)), "the order has 5 positions, not 4"),
        (lambda: GivenFirst(4, RasterOrder(4), given=(4,)), r"must lie in 0\.\.3"),
    ],
)
def test_impossible_orders_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
