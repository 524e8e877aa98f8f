"""Several sequences in one row attend as they would alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok.kernels.attention import KeyMask, PackedMask, attention, pack, unpack
from vistok.kernels.attention.backends import BACKENDS, FlexBackend

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


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same_uncompiled():
    # its objection on a CPU is speed; what it computes can be checked there
    lengths = (5, 1, 20)
    q, k, v = (torch.randn(1, 2, 26, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = attention(q, k, v, PackedMask(lengths), backend="reference")
    actual = FlexBackend()(q, k, v, PackedMask(lengths), None)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_dense_mask_joins_positions_of_one_sequence():
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(PackedMask((2, 1)).dense(3, 3, torch.device("cpu"))[0, 0], expected)


def test_a_row_of_another_length_is_refused():
    q = torch.zeros(1, 1, 4, 8)
    for backend in ("reference", "sdpa"):
        with pytest.raises(ValueError, match="PackedMask covers 3 positions"):
            attention(q, q, q, PackedMask((2, 1)), backend=backend)


def test_backends_say_which_masks_they_do_not_take():
    q = torch.zeros(2, 1, 3, 8)
    objections = BACKENDS["xformers"].objections(q, PackedMask((2, 1)))
    assert "takes one packed row, got 2" in objections and not any("no PackedMask" in o for o in objections)
    assert "takes a PackedMask or an OrderMask, got KeyMask" in BACKENDS["flex"].objections(
        q, KeyMask(torch.ones(2, 3, dtype=torch.bool))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "xformers", "flex"])
def test_gpu_backends_compute_the_reference(name):
    mask = PackedMask(tuple(LENGTHS))
    q, k, v = (torch.randn(1, 2, sum(LENGTHS), 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if objections := BACKENDS[name].objections(q, mask):
        pytest.skip(f"{name}: {objections}")
    exact = attention(q.float(), k.float(), v.float(), mask, backend="reference")
    budget = (attention(q, k, v, mask, backend="reference") - exact).abs().max()
    assert (attention(q, k, v, mask, backend=name) - exact).abs().max() <= 2 * budget + 1e-5
