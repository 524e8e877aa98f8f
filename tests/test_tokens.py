import pytest
import torch

from vistok.tokens import Layout, Tokens, concatenate


def make(rows: int = 2, length: int = 4) -> Tokens:
    return Tokens(indices=torch.arange(rows * length).view(rows, length), codebook_size=100)


def test_keep_takes_a_prefix_of_every_image():
    tokens = Tokens(indices=torch.arange(8).view(2, 4), codebook_size=8, lengths=torch.tensor([4, 1]))
    kept = tokens.keep(2)
    assert kept.data.tolist() == [[0, 1], [4, 5]]
    assert kept.token_counts.tolist() == [2, 1]
    with pytest.raises(ValueError, match="1..4"):
        tokens.keep(5)


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


@pytest.mark.parametrize("layout", [Layout(), Layout((4, 4)), Layout((2, 3, 5))])
def test_layout_text_round_trip(layout):
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either indices"),
        ({"indices": torch.zeros(1, 2, dtype=torch.int64)}, "codebook_size"),
        ({"indices": torch.zeros(1, 2, dtype=torch.int32), "codebook_size": 4}, "int64"),
        ({"indices": torch.tensor([[0, 4]]), "codebook_size": 4}, "token id 4 is out of range"),
        ({"indices": torch.tensor([[0, -1]]), "codebook_size": 4}, "token id -1 is out of range"),
        ({"latents": torch.zeros(1, 2)}, "b n c"),
        ({"latents": torch.zeros(1, 2, 3), "lengths": torch.tensor([3])}, "0..2"),
        ({"latents": torch.zeros(1, 2, 3), "lengths": torch.tensor([1, 1])}, "lengths must be int64"),
    ],
)
def test_bad_tokens_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokens(**arguments)
