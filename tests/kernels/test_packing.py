"""Several sequences in one row attend as they would alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok.kernels.attention import PackedMask, attention, pack, unpack

LENGTHS = [5, 1, 63, 8]


def padded(*shape: int, lengths: list[int] = LENGTHS, padding: float = float("nan")) -> Tensor:
    """Random rows whose padding is poisoned."""
    values = torch.randn(len(lengths), max(lengths), *shape, generator=torch.Generator().manual_seed(0))
    for row, length in zip(values, lengths, strict=True):
        row[length:] = padding
    return values


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], backend: str) -> Tensor:
    """`[b n h d]` each -> `[b n h d]`, through one packed row."""
    row = [pack(x, lengths).transpose(1, 2) for x in (q, k, v)]  # [1 h sum(lengths) d]
    mixed = attention(*row, PackedMask(tuple(lengths)), backend=backend)
    return unpack(mixed.transpose(1, 2), lengths)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    result = torch.zeros_like(q)
    for i, length in enumerate(lengths):
        alone = [x[i : i + 1, :length].transpose(1, 2) for x in (q, k, v)]
        result[i, :length] = attention(*alone, backend="reference").transpose(1, 2)[0]
    return result


def test_pack_and_unpack_are_inverse_and_leave_the_padding_out():
    row = pack(padded(3), LENGTHS)
    assert row.shape == (1, sum(LENGTHS), 3) and row.isfinite().all()
    assert torch.equal(unpack(row, LENGTHS), padded(3, padding=0.0))
    assert unpack(row, LENGTHS, 70).shape == (4, 70, 3)
    with pytest.raises(ValueError, match="4 rows of 63 positions have no lengths"):
        pack(padded(3), LENGTHS[:3])
    with pytest.raises(ValueError, match="63 positions"):
        pack(padded(3), [64, 1, 1, 1])


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_packing_changes_neither_results_nor_gradients(backend):
    inputs = [padded(2, 8).roll(shift, dims=-1) for shift in range(3)]
    results = []
    for compute in (one_by_one, packed_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        arguments = (LENGTHS, backend) if compute is packed_attention else (LENGTHS,)
        out = compute(*leaves, *arguments)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for alone, together in zip(*results, strict=True):
        assert together.isfinite().all()
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_dense_mask_joins_positions_of_one_sequence():
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(PackedMask((2, 1)).dense(3, 3, torch.device("cpu"))[0, 0], expected)
