"""Decode attention against a composition in float64, row by row and query by query."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vistok.kernels.decode_attention import decode_attention
from vistok.kernels.decode_attention.dispatch import _log_once
from vistok.kernels.rotation import Rotation, rotate
from vistok.kernels.triton_support import is_interpreting

NAN = float("nan")
EPSILON = 2e-6  # some units in the last place of float32

interpreted = pytest.mark.skipif(
    not is_interpreting(), reason="kernels run on the GPU: see the tests marked so"
)
TRITON = pytest.param("triton", marks=interpreted)
BACKENDS = ["reference", "torch", TRITON]

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


@dataclass
class Inputs:
    """The arguments of `decode_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    ancestors: Tensor | None = None
    rotation: Rotation | None = None
    keep: Tensor | None = None
    scale: float | None = None

    def attend(self, backend: str = "auto") -> Tensor:
        return decode_attention(**vars(self), backend=backend)

    def copy(self) -> Inputs:
        """With storage of its own."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

    def to(self, *options: torch.dtype | str) -> Inputs:
        """Blocks and storage in another dtype; everything on another device."""
        moved = {
            name: x.to(*options) for name in ("q", "k", "v", "keys", "values") for x in [getattr(self, name)]
        }
        for name in ("lengths", "ancestors", "keep"):
            if getattr(self, name) is not None:
                moved[name] = getattr(self, name).to(moved["q"].device)
        if self.rotation is not None:
            moved["rotation"] = tuple(x.to(moved["q"].device) for x in self.rotation)
        return replace(self, **moved)


def inputs(
    lengths: list[int],
    num_new: int = 1,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    max_length: int = 40,
    dtype: torch.dtype = torch.float32,
    rotates: bool = True,
) -> Inputs:
    """Random rows; what lies behind their lengths is NaN. Blocks are views of `[b n h d]`, as projections give them."""
    generator = torch.Generator().manual_seed(num_new)
    b = len(lengths)

    def block(num_heads: int, count: int) -> Tensor:
        return torch.randn(b, count, num_heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    storage = [block(heads[1], max_length).contiguous() for _ in range(2)]
    for stored in storage:
        for row, length in zip(stored, lengths, strict=True):
            row[:, length:] = NAN
    blocks = block(heads[0], num_new), block(heads[1], num_new), block(heads[1], num_new)
    case = Inputs(*blocks, *storage, torch.tensor(lengths, dtype=torch.int64))
    if rotates:
        angles = 6 * torch.rand(b, 1, num_new, head_dim // 2, generator=generator)
        case.rotation = angles.cos(), angles.sin()
    return case


def tree(num_new: int, batch_size: int = 1) -> Tensor:
    """A root, two children of it, and so on: node i hangs under (i - 1) // 2; the last row's nodes are a chain."""
    above = torch.eye(num_new, dtype=torch.bool).repeat(batch_size, 1, 1)
    for node in range(1, num_new):
        above[:, node] |= above[:, (node - 1) // 2]
    if batch_size > 1:
        above[-1] = torch.ones(num_new, num_new).tril().bool()
    return above


def some(batch_size: int, max_length: int) -> Tensor:
    """Two of three positions, others in each row."""
    return (torch.arange(max_length) + torch.arange(batch_size)[:, None]) % 3 > 0


def naive(case: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """By the words of the definition, in float64 from numbers that are given: the result and the storage after it."""
    case = case.copy()
    wide = case.to(torch.float64)
    q, k = wide.q, wide.k
    if case.rotation is not None:
        cos, sin = (x.double() for x in case.rotation)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    b, h, t, d = q.shape
    max_length, group = case.keys.shape[2], h // case.keys.shape[1]
    scale = d**-0.5 if case.scale is None else case.scale
    result = torch.zeros_like(q)
    for row, length in enumerate(case.lengths.tolist()):
        num_fitting = max(0, min(t, max_length - length))
        wide.keys[row, :, length : length + num_fitting] = k[row, :, :num_fitting]
        wide.values[row, :, length : length + num_fitting] = wide.v[row, :, :num_fitting]
        for query in range(t):
            before = [n for n in range(min(length, max_length)) if case.keep is None or case.keep[row, n]]
            above = None if case.ancestors is None else case.ancestors.expand(b, -1, -1)[row, query]
            seen = before + [length + n for n in range(num_fitting) if above is None or above[n]]
            if seen:
                for head in range(h):
                    logits = wide.keys[row, head // group, seen] @ q[row, head, query] * scale
                    result[row, head, query] = logits.softmax(0) @ wide.values[row, head // group, seen]
    return result, wide.keys, wide.values


def assert_exact(case: Inputs, backend: str, factor: float = 2.0) -> None:
    """The error is at most `factor` times that of the reference in the same dtype; so is that of what is stored."""
    exact = naive(case.to("cpu"))
    reference, actual = case.to("cpu").copy(), case.copy()
    plain = reference.attend("reference"), reference.keys, reference.values
    got = actual.attend(backend).cpu(), actual.keys.cpu(), actual.values.cpu()
    for name, expected, budget, result in zip(("result", "keys", "values"), exact, plain, got, strict=True):
        assert result.dtype == case.q.dtype and result.shape == expected.shape
        assert torch.equal(result.isnan(), expected.isnan()), name
        error, allowed = ((x.double() - expected).nan_to_num().abs().max() for x in (result, budget))
        largest = expected.nan_to_num().abs().max()
        assert allowed <= largest / 100
        assert error <= factor * allowed + EPSILON * largest, f"{name}: {error} against {allowed}"


CASES = {
    "one new position": inputs([5, 12]),
    "one, not grouped": inputs([0, 40, 39, 17], heads=(2, 2)),
    "one of six heads": inputs([7, 30], heads=(6, 1)),
    "two queries per key head": inputs([3, 16], 2, heads=(2, 2)),
    "a diagonal": inputs([0, 33, 12], 7),
    "a prefix": inputs([0], 20, heads=(2, 1)),
    "long": inputs([150, 81], heads=(1, 1), max_length=151),
    "without positions": inputs([0, 9], 3, rotates=False),
    "shared positions": replace(inputs([1, 9], 3), rotation=(torch.rand(3, 8), torch.rand(3, 8))),
    "a tree": replace(inputs([4, 0], 6), ancestors=tree(6)),
    "trees": replace(inputs([4, 20], 5), ancestors=tree(5, 2)),
    "hidden positions": replace(inputs([40, 5], 1), keep=some(2, 40)),
    "a tree and hidden positions": replace(inputs([13, 30], 6), ancestors=tree(6), keep=some(2, 40)),
    "more than fits": inputs([38, 40, 10], 5),
    "more of a tree than fits": replace(inputs([38, 36], 5), ancestors=tree(5)),
    "another scale": replace(inputs([6, 2], 2), scale=0.7),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_backends_compute_the_definition(name: str, backend: str) -> None:
    assert_exact(CASES[name], backend)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize(
    ("head_dim", "num_new", "heads"),
    [(32, 1, (1, 1)), (48, 3, (2, 1)), (80, 1, (2, 2)), (100, 2, (2, 1)), (128, 5, (1, 1))],
)
def test_heads_of_many_sizes(head_dim: int, num_new: int, heads: tuple[int, int], backend: str) -> None:
    assert_exact(inputs([6, 70], num_new, head_dim=head_dim, heads=heads, max_length=75), backend)


@pytest.mark.parametrize("num_new", [1, 4])
@pytest.mark.parametrize(
    ("backend", "dtype", "factor"),
    [
        ("torch", torch.float16, 4),  # the products of the reference are exact, these are rounded
        ("torch", torch.bfloat16, 4),
        pytest.param("triton", torch.float16, 2, marks=interpreted),
        # The interpreter cuts queries, weights and results to bfloat16 where hardware rounds.
        pytest.param("triton", torch.bfloat16, 6, marks=interpreted),
    ],
)
def test_half_precision(backend: str, dtype: torch.dtype, factor: float, num_new: int) -> None:
    assert_exact(replace(inputs([30, 11], num_new, dtype=dtype), keep=some(2, 40)), backend, factor)


@interpreted
@pytest.mark.parametrize("num_parts", [2, 5])
@pytest.mark.parametrize("name", ["one, not grouped", "long", "a tree and hidden positions"])
def test_parts_of_the_stored_positions_are_joined(name: str, num_parts: int) -> None:
    from vistok.kernels.decode_attention.triton import triton_decode_attention

    case = CASES[name].copy()
    expected = CASES[name].copy().attend("reference")
    torch.testing.assert_close(
        triton_decode_attention(**vars(case), num_parts=num_parts), expected, atol=1e-5, rtol=0
    )


def test_the_number_of_parts_depends_on_sizes() -> None:
    from vistok.kernels.decode_attention.triton import useful_parts

    assert useful_parts(24, 257, 132) == 1  # read before a second kernel starts
    assert useful_parts(24, 1024, 132) == 4
    assert useful_parts(24, 2**20, 132) == 11
    assert useful_parts(1, 2**20, 132) == 32
    assert useful_parts(1536, 4096, 132) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gets_zeros(backend: str) -> None:
    case = replace(inputs([3, 40, 0], 2), keep=torch.zeros(3, 40, dtype=torch.bool), ancestors=tree(2))
    case.ancestors = torch.zeros_like(case.ancestors)
    assert not case.attend(backend).any()
    assert torch.equal(case.values[0, :, 3:5], case.v[0])  # it is stored all the same


@pytest.mark.parametrize("backend", BACKENDS)
def test_storage_that_is_a_part_of_another(backend: str) -> None:
    whole = inputs([9, 4], max_length=60)
    part = replace(
        whole, keys=whole.keys[:, :, 10:30], values=whole.values.transpose(1, 2).contiguous().transpose(1, 2)
    )
    part.values = part.values[:, :, 10:30]
    for stored in (part.keys, part.values):
        stored.copy_(torch.randn(stored.shape, generator=torch.Generator().manual_seed(1)))
    before, beyond = whole.keys[:, :, :10].clone(), whole.keys[:, :, 30:].clone()
    assert_exact(part, backend)
    part.attend(backend)
    assert torch.equal(whole.keys[:, :, :10].nan_to_num(), before.nan_to_num())
    assert torch.equal(whole.keys[:, :, 30:].nan_to_num(), beyond.nan_to_num())
    assert torch.equal(part.values[0, :, 9], part.v[0, :, 0])


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_inputs_that_are_not_contiguous(backend: str) -> None:
    case = inputs([9, 4, 4], 3)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (case.q, case.k, case.v))
    assert q.stride(3) != 1
    cos, sin = case.rotation
    rotation = cos.transpose(2, 3).contiguous().transpose(2, 3), sin
    lengths = torch.tensor([[9, 0], [4, 0], [4, 0]])[:, 0]
    assert_exact(
        replace(case, q=q, k=k, v=v, rotation=rotation, lengths=lengths, keep=some(3, 80)[:, ::2]), backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str) -> None:
    assert inputs([], 2).attend(backend).shape == (0, 4, 2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_grow_the_cache(backend: str) -> None:
    """A prefix and single steps give what the block of all gives."""
    whole = replace(inputs([0, 0], 9, rotates=False), ancestors=torch.ones(1, 9, 9).tril().bool())
    expected = whole.copy().attend("reference")
    case = whole.copy()
    results = []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        block = {name: getattr(whole, name)[:, :, start:end] for name in ("q", "k", "v")}
        ancestors = whole.ancestors[:, start:end, start:end]
        results.append(
            replace(case, **block, ancestors=ancestors, lengths=torch.full((2,), start)).attend(backend)
        )
    torch.testing.assert_close(torch.cat(results, dim=2), expected, atol=1e-5, rtol=0)
    assert torch.equal(case.keys[:, :, :9], whole.k) and case.keys[:, :, 9:].isnan().all()


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("name", ["one, not grouped", "a tree and hidden positions"])
def test_compiled_as_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    step = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    eager, compiled = CASES[name].copy(), CASES[name].copy()
    expected = eager.attend("reference")
    result = step(**vars(compiled), backend=backend)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(compiled.keys, eager.keys, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(compiled.values.nan_to_num(), eager.values.nan_to_num())


def test_one_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(decode_attention, fullgraph=True, backend=count)
    for lengths in ([0, 40], [7, 7]):
        case = inputs(lengths)
        torch.testing.assert_close(step(**vars(case.copy())), case.attend("reference"), atol=1e-5, rtol=0)
    assert len(graphs) == 1


def test_auto_takes_pytorch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vistok.kernels.decode_attention import dispatch

    taken = []
    monkeypatch.setitem(dispatch.BACKENDS, "torch", lambda *arguments: taken.append("torch"))
    CASES["a tree"].copy().attend()
    assert taken == ["torch"]


def test_why_triton_is_not_taken_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        _log_once("takes heads of up to 256 channels, got 512")
        _log_once("takes heads of up to 256 channels, got 512")
    assert [record.getMessage() for record in caplog.records] == [
        "decode attention without Triton: takes heads of up to 256 channels, got 512"
    ]


@interpreted
def test_a_named_backend_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="available: auto, triton, torch, reference"):
        inputs([3]).attend("flash")
    with pytest.raises(
        ValueError, match="'triton' cannot run: needs queries, keys, values and storage of one dtype"
    ):
        replace(inputs([3]), q=inputs([3]).q.double()).attend("triton")
    with pytest.raises(ValueError, match="up to 64 new positions, got 65"):
        inputs([3], 65).attend("triton")
    with pytest.raises(ValueError, match="heads of up to 256 channels, got 258"):
        inputs([3], head_dim=258).attend("triton")
    case = inputs([3])
    with pytest.raises(ValueError, match="channels lie beside each other"):
        replace(case, keys=case.keys.mT.contiguous().mT).attend("triton")
    with pytest.raises(ValueError, match="has no gradient"):
        replace(case, q=case.q.clone().requires_grad_()).attend("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        case.attend("triton")


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = inputs([3, 5], 2)
    with pytest.raises(ValueError, match=r"need new keys and values \[2 2 2 16\], got \[2, 2, 1, 16\]"):
        replace(case, k=case.k[:, :, :1]).attend()
    with pytest.raises(ValueError, match="2 rows of 16 channels cannot be stored in"):
        replace(case, values=case.values[:1]).attend()
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        replace(case, q=case.q[:, :3]).attend()
    with pytest.raises(ValueError, match=r"one per row, \[2\], got \[1\]"):
        replace(case, lengths=case.lengths[:1]).attend()
    with pytest.raises(ValueError, match=r"ancestors of 2 new positions are \[2 2 2\] or \[1 2 2\]"):
        replace(case, ancestors=tree(3)).attend()
    with pytest.raises(ValueError, match=r"keep covers the storage, \[2 40\], got \[2, 39\]"):
        replace(case, keep=some(2, 39)).attend()
    with pytest.raises(ValueError, match=r"is \[2 8\] or \[2 1 2 8\], got \[\[3, 8\], \[3, 8\]\]"):
        replace(case, rotation=(torch.ones(3, 8), torch.ones(3, 8))).attend()


def test_storage_of_another_dtype_than_the_queries() -> None:
    case = inputs([5, 12], 2)
    mixed = replace(case, keys=case.keys.bfloat16(), values=case.values.bfloat16())
    expected, result = (mixed.copy().attend(backend) for backend in ("reference", "auto"))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_definition_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = CASES[name].to(dtype).to("cuda")
    for backend in ("triton", "torch", "auto"):
        assert_exact(case, backend, factor=4 if backend == "torch" else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 100, 128, 256])
@pytest.mark.parametrize("num_new", [1, 2, 16, 64])
def test_heads_of_many_sizes_on_a_gpu(num_new: int, head_dim: int) -> None:
    case = inputs([0, 600, 1000], num_new, head_dim=head_dim, max_length=1024, dtype=torch.bfloat16)
    assert_exact(replace(case, ancestors=tree(num_new)).to("cuda"), "triton")


@pytest.mark.gpu
def test_a_cache_beyond_two_to_the_31_numbers() -> None:
    shape = (9, 8, 2**19, 64)  # 4.5 GiB in bfloat16, each of keys and values
    keys, values = (torch.full(shape, NAN, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    small = inputs([4] * 9, heads=(8, 8), head_dim=64, dtype=torch.bfloat16, max_length=8).to("cuda")
    keys[:, :, :4], values[:, :, :4] = small.keys[:, :, :4], small.values[:, :, :4]
    large = replace(small, keys=keys, values=values)
    torch.testing.assert_close(large.attend("triton"), small.attend("reference"), atol=2e-2, rtol=2e-2)
    assert torch.equal(values[-1, :, 4], small.v[-1, :, 0])
