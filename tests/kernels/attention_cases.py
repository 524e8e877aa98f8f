"""Inputs, masks and the error budget that the tests of attention share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.kernels.attention import (
    AttentionMask,
    CausalMask,
    KeyMask,
    LastKeyRepeats,
    OrderMask,
    PackedMask,
    SelfMask,
    TreeMask,
    attention,
)

EPSILON = 2e-6  # some units in the last place of float32; half precision is far above


def inputs(
    num_queries: int,
    num_keys: int,
    *,
    batch_size: int = 2,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 24,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """q `[b h q d]`, k and v `[b hk k d]`."""
    generator = torch.Generator().manual_seed(num_keys)
    lengths = ((heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys))
    shapes = [(batch_size, *length, head_dim) for length in lengths]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def ragged(num_keys: int) -> Tensor:
    """`[2 k]`: all keys of the first row; of the second neither the last nor some between."""
    keep = torch.ones(2, num_keys, dtype=torch.bool)
    keep[1, num_keys // 2 : num_keys // 2 + 3] = False
    keep[1, -1] = num_keys == 1
    return keep


def orders(num_queries: int, num_keys: int) -> list[OrderMask]:
    """The queries are the last keys: one order for all rows, one for each with private keys, and mixed."""
    generator = torch.Generator().manual_seed(num_keys)
    keys = torch.randint(0, num_keys, (2, num_keys), generator=generator)
    is_private = torch.rand(num_keys, generator=generator) < 0.5
    queries = keys[:, num_keys - num_queries :]
    return [
        OrderMask(queries[0], keys[0]),
        OrderMask(queries, keys, is_private),
        OrderMask(queries[0], keys.sort().values),
        OrderMask(queries[:, :1].expand(-1, num_queries), keys[0]),
    ]


def tree(num_keys: int) -> TreeMask:
    """Five nodes behind rows of `k - 5` and 3 committed positions: a root, two children of it, and one of each."""
    ancestors = torch.eye(5, dtype=torch.bool)
    ancestors[1:, 0] = ancestors[3, 1] = ancestors[4, 2] = True
    return TreeMask(torch.tensor([num_keys - 5, 3]), ancestors[None])


MASKS = {  # name -> queries, keys, mask; tiles are of 32 positions in float32
    "none": (33, 40, None),
    "causal": (40, 40, CausalMask()),
    "causal, behind a cache": (33, 40, CausalMask()),
    "causal, one query": (1, 9, CausalMask()),
    "keys": (33, 40, KeyMask(ragged(40))),
    "a prefix of keys": (7, 19, KeyMask.prefix([19, 4], 19)),
    "order": (7, 19, orders(7, 19)[0]),
    "orders with private keys": (33, 40, orders(33, 40)[1]),
    "tree": (5, 40, tree(40)),
    "a repeated key": (7, 19, LastKeyRepeats(100)),
    "packed": (40, 40, PackedMask((5, 1, 20, 14))),
    "joined": (7, 19, CausalMask() & KeyMask(ragged(19)) | SelfMask()),
}


def case(name: str, dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], AttentionMask | None]:
    """Inputs and mask; a packed row is one row."""
    num_queries, num_keys, mask = MASKS[name]
    batch_size = 1 if isinstance(mask, PackedMask) else 2
    return inputs(num_queries, num_keys, batch_size=batch_size, dtype=dtype, **options), mask


def results(
    tensors: list[Tensor], mask: AttentionMask | None, backend: str, with_gradients: bool = True
) -> list[Tensor]:
    """The output, and the gradients of a sum of it."""
    leaves = [x.detach().requires_grad_(with_gradients) for x in tensors]
    out = attention(*leaves, mask, backend=backend)
    if not with_gradients:
        return [out]
    weights = torch.arange(out.numel(), device=out.device).view(out.shape).sin().to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_as_exact_as_plain(
    tensors: list[Tensor],
    mask: AttentionMask | None,
    backend: str,
    with_gradients: bool = True,
    factor: float = 2.0,
) -> None:
    """Against float64, the error is at most `factor` times that of the definition in the same dtype."""
    exact = results([x.double() for x in tensors], mask, "reference", with_gradients)
    plain = results(tensors, mask, "reference", with_gradients)
    actual = results(tensors, mask, backend, with_gradients)
    for name, expected, budget, got in zip("oqkv", exact, plain, actual, strict=False):
        assert got.dtype == tensors[0].dtype and got.shape == expected.shape
        allowed = factor * (budget - expected).abs().max() + EPSILON * expected.abs().max()
        error = (got - expected).abs().max()
        assert error <= allowed, f"{name}: {error} is above {allowed}"
