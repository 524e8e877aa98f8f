import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.tokens import Layout, Tokens, concatenate


def make(rows: int = 2, length: int = 4) -> Tokens:
    return Tokens(indices=torch.arange(rows * length).view(rows, length), codebook_size=100)


def test_keep_takes_a_prefix_of_every_image():
    tokens = Tokens(indices=torch.arange(8).view(2, 4), codebook_size=8, lengths=torch.tensor([4, 1]))
    kept = tokens.keep(2)
    assert kept.data.tolist() == [[0, 1], [4, 0]]
    assert kept.token_counts.tolist() == [2, 1]
    with pytest.raises(ValueError, match="1..4"):
        tokens.keep(5)


def test_keep_takes_a_length_for_each_image():
    tokens = Tokens(indices=torch.arange(12).view(3, 4), codebook_size=12, lengths=torch.tensor([4, 2, 3]))
    for lengths in ([1, 3, 3], torch.tensor([1, 3, 3])):
        kept = tokens.keep(lengths)
        assert kept.token_counts.tolist() == [1, 2, 3]  # the second had two tokens only
        assert kept.data.tolist() == [[0, 0, 0], [4, 5, 0], [8, 9, 10]]
    latents = Tokens(latents=torch.full((2, 3, 2), torch.nan)).keep([1, 2]).data
    assert latents.shape == (2, 2, 2) and not latents[0, 1].any() and latents[1].isnan().all()


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [
        (0, r"1\.\.4"),
        ([1, 5], r"1\.\.4"),
        ([1, 0], r"1\.\.4"),
        ([1, 2, 3], "2 of them, one per image"),
        (torch.ones(2, 1, dtype=torch.int64), "2 of them, one per image"),
        (1.5, "one integer"),
        (True, "one integer"),
        (torch.tensor([1, 2], dtype=torch.int32), "one integer"),
    ],
)
def test_keep_refuses_other_lengths(num_tokens, message):
    with pytest.raises(ValueError, match=message):
        make().keep(num_tokens)


def test_concatenate_pads_to_the_longest():
    joined = concatenate([make(1, 4), make(2, 2)])
    assert joined.data.shape == (3, 4)
    assert joined.token_counts.tolist() == [4, 2, 2]
    assert joined.data[1].tolist() == [0, 1, 0, 0]


def test_concatenate_refuses_tokens_of_another_codebook():
    with pytest.raises(ValueError, match="codebook sizes"):
        concatenate([make(), Tokens(indices=torch.zeros(1, 4, dtype=torch.int64), codebook_size=7)])


def test_to_casts_latents_and_never_indices():
    assert make().to(dtype=torch.bfloat16).data.dtype == torch.int64
    assert Tokens(latents=torch.zeros(1, 2, 3)).to(dtype=torch.bfloat16).data.dtype == torch.bfloat16


def test_slices_keep_lengths():
    tokens = Tokens(latents=torch.randn(3, 2, 5), lengths=torch.tensor([2, 1, 2]))
    assert tokens[1:].token_counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    "images",
    [
        [2, 0],
        (2, 0),
        torch.tensor([2, 0]),
        slice(None, None, 2),
        [True, False, True],
        torch.tensor([1, 0, 1]).bool(),
    ],
)
def test_images_are_chosen_by_number_slice_or_mask(images):
    tokens = Tokens(indices=torch.arange(6).view(3, 2), codebook_size=6, lengths=torch.tensor([2, 1, 1]))
    chosen = tokens[images]
    expected = {0: ([0, 1], 2), 2: ([4, 5], 1)}
    order = [0, 2] if chosen.data[0, 0] == 0 else [2, 0]
    assert [*zip(chosen.data.tolist(), chosen.token_counts.tolist(), strict=True)] == [
        expected[i] for i in order
    ]
    assert order == ([2, 0] if not isinstance(images, slice) and images[0] == 2 else [0, 2])


def test_one_image_is_a_batch_and_no_image_too():
    tokens = make(3)
    assert tokens[1].data.tolist() == [[4, 5, 6, 7]] and tokens[-1].data.tolist() == [[8, 9, 10, 11]]
    assert len(tokens[[]]) == len(tokens[torch.zeros(3, dtype=torch.bool)]) == 0
    assert [len(image) for image in tokens] == [1, 1, 1]


def test_the_parts_of_a_batch_join_to_the_batch():
    tokens = Tokens(indices=torch.arange(12).view(3, 4), codebook_size=12).keep([4, 1, 2])
    joined = concatenate([tokens[i].keep(int(tokens.token_counts[i])) for i in range(3)])
    assert torch.equal(joined.data, tokens.data) and torch.equal(joined.token_counts, tokens.token_counts)
    assert joined.is_token.tolist() == [[True] * 4, [True, False, False, False], [True, True, False, False]]


sizes = st.integers(1, 5)
layouts = st.one_of(
    st.just(Layout()),
    st.lists(sizes, min_size=2, max_size=3).map(lambda grid: Layout(tuple(grid))),
    st.lists(st.tuples(sizes, sizes), min_size=2, max_size=4).map(
        lambda scales: Layout(scales=tuple(scales))
    ),
)


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_layout_text_round_trip(layout):
    assert Layout.parse(str(layout)) == layout


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_every_token_lies_somewhere_else_inside_its_layout(layout):
    num_tokens = 7
    if layout.grid is not None:
        num_tokens = math.prod(layout.grid)
    elif layout.scales is not None:
        num_tokens = sum(h * w for h, w in layout.scales)
    places = layout.coordinates(num_tokens)
    assert places.shape == (num_tokens, layout.num_axes)
    assert len(places.unique(dim=0)) == num_tokens
    extent = layout.grid or (num_tokens,)
    if layout.scales is not None:
        extent = (len(layout.scales), *layout.scales[-1])
    # a token of a scale finer than the last reaches beyond the last one's outermost centres, not beyond its edges
    assert (places > -0.5).all() and (places < torch.tensor(extent) - 0.5).all()
    with pytest.raises(ValueError, match=f"has {num_tokens} positions, not {num_tokens + 1}"):
        Layout(layout.grid or (num_tokens,)).coordinates(num_tokens + 1)


def test_coordinates_are_row_major_and_a_pyramid_counts_in_units_of_its_finest_grid():
    assert Layout().coordinates(3).tolist() == [[0], [1], [2]]
    assert Layout((2, 2)).coordinates(4).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert Layout((2, 1, 2)).coordinates(4).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    pyramid = Layout(scales=((1, 1), (2, 2), (4, 4))).coordinates(21)
    assert pyramid[:5].tolist() == [[0, 1.5, 1.5], [1, 0.5, 0.5], [1, 0.5, 2.5], [1, 2.5, 0.5], [1, 2.5, 2.5]]
    assert torch.equal(pyramid[5:, 1:], Layout((4, 4)).coordinates(16).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (4, 4), "scales": ((1, 1),)}, "not both"),
        ({"grid": (4, 0)}, "at least 1"),
        ({"grid": ()}, "at least 1"),
        ({"scales": ((1, 1), (0, 2))}, "at least 1"),
    ],
)
def test_bad_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either indices"),
        ({"indices": torch.zeros(1, 2, dtype=torch.int64)}, "codebook_size"),
        ({"indices": torch.zeros(1, 2, dtype=torch.int32), "codebook_size": 4}, "int64"),
        ({"indices": torch.tensor([[0, 4]]), "codebook_size": 4}, "token id 4 is out of range"),
        ({"indices": torch.tensor([[0, -1]]), "codebook_size": 4}, "token id -1 is out of range"),
        ({"latents": torch.zeros(1, 2)}, "b n c"),
        ({"latents": torch.zeros(1, 2, 3), "lengths": torch.tensor([3])}, "1..2"),
        ({"latents": torch.zeros(1, 2, 3), "lengths": torch.tensor([0])}, "1..2"),
        ({"latents": torch.zeros(1, 0, 3)}, "at least one token"),
        ({"latents": torch.zeros(1, 2, 3), "lengths": torch.tensor([1, 1])}, "lengths must be int64"),
    ],
)
def test_bad_tokens_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokens(**arguments)


@pytest.mark.parametrize("text", ["16*16", "4+8x8", "", "x", "4x", "grid"])
def test_texts_that_are_no_layout_are_refused(text):
    with pytest.raises(ValueError, match="a layout reads 'sequence', '16x16'"):
        Layout.parse(text)


def test_a_pyramid_has_several_scales():
    with pytest.raises(ValueError, match="at least two scales"):
        Layout(scales=((4, 4),))
