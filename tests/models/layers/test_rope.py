"""Rotary positions: what a rotation keeps, and that only distances count."""

from __future__ import annotations

import pytest
import torch

from vistok.models.layers.rope import axial_rope, rotate
from vistok.tokens import Layout


def vectors(num_tokens: int, head_dim: int) -> torch.Tensor:
    return torch.randn(1, 2, num_tokens, head_dim, generator=torch.Generator().manual_seed(0))


def test_pairs_turn_by_the_angle_of_their_axis_and_frequency() -> None:
    """Against multiplication of complex numbers, channel pair by channel pair."""
    x = vectors(6, 8)
    turned = rotate(x, *axial_rope(Layout((2, 3)).coordinates(6), 8, base=100.0))
    for position, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        angles = torch.tensor([row, row * 100.0**-0.5, column, column * 100.0**-0.5])
        pairs = torch.view_as_complex(x[:, :, position].unflatten(-1, (4, 2)).contiguous())
        expected = torch.view_as_real(pairs * torch.polar(torch.ones(4), angles)).flatten(-2)
        torch.testing.assert_close(turned[:, :, position], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_products_depend_on_distances_only(num_axes: int) -> None:
    q, k = vectors(5, 12), vectors(5, 12).flip(0, 1, 2, 3)
    places = torch.randint(0, 20, (5, num_axes), generator=torch.Generator().manual_seed(1))
    here, there = axial_rope(places, 12), axial_rope(places + 7, 12)
    products = rotate(q, *here) @ rotate(k, *here).mT
    moved = rotate(q, *there) @ rotate(k, *there).mT
    torch.testing.assert_close(moved, products, atol=1e-4, rtol=0)
    assert (products - rotate(q, *here) @ rotate(k, *there).mT).abs().max() > 0.1


def test_a_rotation_keeps_lengths_and_the_origin() -> None:
    x = vectors(4, 8)
    turned = rotate(x, *axial_rope(torch.tensor([[0.0], [1.5], [2.0], [40.0]]), 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_half_precision_is_turned_in_float32() -> None:
    x = vectors(300, 8).bfloat16()
    cos, sin = axial_rope(Layout().coordinates(300), 8)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def test_double_precision_is_kept() -> None:
    x = vectors(4, 8).double() * (1 + 1e-10)
    turned = rotate(x, *axial_rope(torch.zeros(4, 1), 8))
    assert turned.dtype == torch.float64 and torch.equal(turned, x)


@pytest.mark.parametrize(("head_dim", "layout"), [(7, Layout()), (6, Layout((2, 2))), (8, Layout((1, 2, 2)))])
def test_heads_that_the_axes_cannot_share_are_refused(head_dim: int, layout: Layout) -> None:
    with pytest.raises(ValueError, match=f"a multiple of {2 * layout.num_axes}, got {head_dim}"):
        axial_rope(layout.coordinates(4), head_dim)
