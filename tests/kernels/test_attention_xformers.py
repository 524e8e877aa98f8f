"""What xformers is asked for. A stand-in with its types computes their dense meaning; where it is installed, it does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_cases import MASKS, case, inputs, results
from vistok.kernels.attention import CausalMask, KeyMask, attention
from vistok.kernels.attention import xformers as ours
from vistok.kernels.attention.backends import BACKENDS


@dataclass
class Blocks:
    """The lengths of the queries of each block, the places of its keys, and how many of them are used."""

    query_lengths: list[int]
    starts: list[int]
    key_lengths: list[int]

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        assert shape[0] == sum(self.query_lengths)
        dense = torch.full(shape, float("-inf"))
        row = 0
        for length, start, used in zip(self.query_lengths, self.starts, self.key_lengths, strict=True):
            dense[row : row + length, start : start + used] = 0
            row += length
        return dense


class BlockDiagonalMask(Blocks):
    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], *, device: torch.device) -> BlockDiagonalMask:
        starts = [sum(q_seqlen[:i]) for i in range(len(q_seqlen))]
        return cls(q_seqlen, starts, q_seqlen)


class BlockDiagonalPaddedKeysMask(Blocks):
    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_padding: int, kv_seqlen: list[int], *, device: torch.device
    ) -> BlockDiagonalPaddedKeysMask:
        return cls(q_seqlen, [i * kv_padding for i in range(len(q_seqlen))], kv_seqlen)


class LowerTriangularFromBottomRightMask:
    def materialize(self, shape: tuple[int, int]) -> Tensor:
        return torch.full(shape, float("-inf")).triu(shape[1] - shape[0] + 1)


class StandIn:
    """`memory_efficient_attention` in plain PyTorch, with the conditions of the real one."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, object]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, attn_bias: object, scale: float | None) -> Tensor:
        self.calls.append((q, k, v, attn_bias))
        assert q.ndim == k.ndim == v.ndim and k.shape == v.shape
        assert (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])  # nothing is broadcast
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        if q.ndim == 5:
            assert not q.requires_grad and not isinstance(attn_bias, Tensor)
        if isinstance(attn_bias, Blocks):
            assert len(q) == 1
        if isinstance(attn_bias, Tensor):
            assert attn_bias.dtype == q.dtype and attn_bias.shape == (
                *q.transpose(1, 2).shape[:3],
                k.shape[1],
            )
            assert attn_bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        elif attn_bias is not None:
            attn_bias = attn_bias.materialize((q.shape[1], k.shape[1])).to(q.dtype)
        heads = q.shape[2:-1]
        q, k, v = (x.flatten(2, -2).transpose(1, 2) for x in (q, k, v))  # [b h n d]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)
        return out.transpose(1, 2).unflatten(2, heads)


@pytest.fixture
def stand_in(monkeypatch) -> Iterator[StandIn]:
    """Takes the place of `xformers.ops.fmha`."""
    compute = StandIn()
    types = SimpleNamespace(
        BlockDiagonalMask=BlockDiagonalMask,
        BlockDiagonalPaddedKeysMask=BlockDiagonalPaddedKeysMask,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
    )
    ops = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(memory_efficient_attention=compute, attn_bias=types)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(ours.XFormersBackend, "objections", lambda *_: [])
    _forget_forms()
    yield compute
    _forget_forms()


def _forget_forms() -> None:
    """Masks keep what was made of them, here with types of the stand-in."""
    for *_, mask in MASKS.values():
        if mask is not None:
            mask.__dict__.pop("_forms", None)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_it_computes_the_reference(stand_in, name, dtype, with_gradients):
    tensors, mask = case(name, dtype)
    expected = results([x.double() for x in tensors], mask, "reference", with_gradients)
    actual = results(tensors, mask, "xformers", with_gradients)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left.double(), right, atol=tolerance, rtol=tolerance)
    assert len(stand_in.calls) == 1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("none", type(None)),
        ("causal, one query", type(None)),
        ("causal, behind a cache", LowerTriangularFromBottomRightMask),
        ("packed", BlockDiagonalMask),
        ("a prefix of keys", BlockDiagonalPaddedKeysMask),
        ("keys", Tensor),
        ("tree", Tensor),
        ("a repeated key", Tensor),
    ],
)
def test_masks_become_the_types_that_its_kernels_know(stand_in, name, form):
    tensors, mask = case(name, torch.float16)
    attention(*tensors, mask, backend="xformers")
    attention(*tensors, mask, backend="xformers")
    first, second = (call[3] for call in stand_in.calls)
    assert isinstance(first, form)
    assert first is second or form is LowerTriangularFromBottomRightMask  # made once per mask


def test_heads_that_share_keys_are_not_copied(stand_in):
    q, k, v = inputs(3, 5, heads=(6, 2), dtype=torch.float16)
    attention(q, k, v, backend="xformers")
    queries, keys, _, _ = stand_in.calls[0]
    assert queries.shape == (2, 3, 2, 3, 24) and keys.shape == (2, 5, 2, 3, 24)
    assert keys.stride(3) == 0 and keys.data_ptr() == k.data_ptr()


def test_prefixes_need_a_backward_pass_as_a_dense_mask(stand_in):
    q, k, v = inputs(3, 5, dtype=torch.float16)
    attention(q.requires_grad_(), k, v, KeyMask.prefix([5, 2], 5), backend="xformers")
    assert isinstance(stand_in.calls[0][3], Tensor)


def test_what_hidden_keys_hold_does_not_leak(stand_in):
    q, k, v = inputs(3, 5, dtype=torch.float16)
    mask = KeyMask(torch.arange(5) < torch.tensor([[5], [2]]))
    k[1, :, 2:] = v[1, :, 2:] = float("nan")
    assert attention(q, k, v, mask, backend="xformers").isfinite().all()


def test_installed_xformers_means_the_same_by_its_types():
    types = pytest.importorskip("xformers.ops.fmha").attn_bias
    for name in ("causal, behind a cache", "packed", "a prefix of keys"):
        (q, k, v), mask = case(name, torch.float16)
        bias = ours._bias(types, q, k, mask, is_dense=False)
        num_queries, num_keys, dense = q.shape[2], k.shape[2], mask.dense(q.shape[2], k.shape[2], q.device)
        if name == "a prefix of keys":  # rows are blocks of one
            rows = dense[:, 0].expand(-1, num_queries, -1)
            dense = torch.block_diag(*rows)[None, None].bool()
            num_queries, num_keys = 2 * num_queries, 2 * num_keys
        added = bias.materialize((num_queries, num_keys), dtype=torch.float32)
        assert torch.equal(added == 0, dense[0, 0])


@pytest.mark.parametrize("head_dim", [12, 20])
def test_heads_that_do_not_fill_vectors_are_refused(head_dim):
    q, k, v = inputs(3, 5, head_dim=head_dim, dtype=torch.float16)
    reasons = BACKENDS["xformers"].objections(q, k, v, CausalMask())
    assert any(f"multiple of 8 channels, got {head_dim}" in reason for reason in reasons)
    reasons = BACKENDS["xformers"].objections(q.float(), k.float(), v.float(), CausalMask())
    assert not any("channels" in reason for reason in reasons)
