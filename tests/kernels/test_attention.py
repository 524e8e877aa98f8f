"""Every backend computes the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_cases import (
    MASKS,
    assert_as_exact_as_plain,
    case,
    inputs,
    ragged,
    results,
    tree,
)
from vistok.kernels.attention import AttentionMask, CausalMask, KeyMask, LastKeyRepeats, SelfMask, attention
from vistok.kernels.attention.backends import BACKENDS
from vistok.kernels.attention.diffusers import DIFFERENTIABLE, INFERENCE_ONLY

ON_CPU = ["reference", "sdpa", "flex", "triton"]  # Triton's interpreter runs its kernels

pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:divide by zero encountered:RuntimeWarning"
)


def has_gradient(backend: str) -> bool:
    return backend != "flex"  # on the CPU


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "triton", "flex"])
def test_backends_are_as_exact_as_plain_pytorch(backend, mask):
    assert_as_exact_as_plain(*case(mask, torch.float32), backend, has_gradient(backend))


@pytest.mark.parametrize("mask", ["causal, behind a cache", "keys", "a repeated key"])
@pytest.mark.parametrize("backend", ["sdpa", "triton", "flex"])
def test_backends_are_as_exact_as_plain_pytorch_in_half_precision(backend, mask):
    assert_as_exact_as_plain(*case(mask, torch.float16), backend, has_gradient(backend))


def test_triton_takes_bfloat16():
    # The interpreter cuts numbers to bfloat16 where hardware rounds: twice the error.
    assert_as_exact_as_plain(*case("joined", torch.bfloat16), "triton", factor=4)
    assert_as_exact_as_plain(*case("joined", torch.bfloat16), "sdpa")


@pytest.mark.parametrize("head_dim", [8, 100, 128])
def test_triton_covers_heads_of_many_sizes(head_dim):
    assert_as_exact_as_plain(inputs(5, 40, head_dim=head_dim, heads=(2, 2)), CausalMask(), "triton")


@pytest.mark.parametrize("backend", ON_CPU)
def test_heads_in_a_row_share_keys(backend):
    q, k, v = inputs(3, 5, heads=(6, 2))
    shared = attention(q, k, v, CausalMask(), backend=backend)
    alone = attention(q[:, 3:4], k[:, 1:], v[:, 1:], CausalMask(), backend=backend)
    torch.testing.assert_close(shared[:, 3:4], alone)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_the_scale_multiplies_the_logits(backend, scale):
    q, k, v = inputs(3, 5)
    expected = attention(q * scale * 24**0.5, k, v, backend="reference")
    torch.testing.assert_close(attention(q, k, v, scale=scale, backend=backend), expected)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("mask", [KeyMask(ragged(40)), tree(40), CausalMask() & KeyMask(ragged(40))])
def test_what_hidden_keys_hold_does_not_leak(backend, mask: AttentionMask):
    q, k, v = inputs(5, 40)
    seen = mask.dense(5, 40, q.device).any(dim=2)[..., None]  # [2 1 k 1]
    clean, poisoned = (
        results([q, *(x.masked_fill(~seen, held) for x in (k, v))], mask, backend, has_gradient(backend))
        for held in (0.0, float("nan"))
    )
    assert not seen.all()
    for expected, actual in zip(clean, poisoned, strict=True):
        assert torch.equal(actual, expected) and actual.isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_queries_that_see_nothing_get_zeros(backend):
    mask = KeyMask(torch.tensor([[True, False, True], [False, False, False]]))
    out, *gradients = results(inputs(4, 3), mask, backend, has_gradient(backend))
    assert out[0].abs().min() > 0 and not out[1].any()
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_inputs_may_lie_in_any_order(backend):
    q, k, v = inputs(7, 19)
    fused = torch.cat([q.transpose(1, 2), q.transpose(1, 2)], dim=-1).unflatten(-1, (2, 24))
    odd_q = fused[..., 1, :].transpose(1, 2)  # of a fused projection
    odd_k = torch.cat([k, k], dim=2)[:, :, :19]  # of a cache
    odd_v = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(x.is_contiguous() for x in (odd_q, odd_k, odd_v)) and odd_v.stride(-1) != 1
    expected = results([q, k, v], CausalMask(), backend, has_gradient(backend))
    actual = results([odd_q, odd_k, odd_v], CausalMask(), backend, has_gradient(backend))
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("backend", ON_CPU)
def test_an_empty_batch_stays_empty(backend):
    q, k, v = (x[:0] for x in inputs(3, 5))
    assert attention(q, k, v, CausalMask(), backend=backend).shape == (0, 2, 3, 24)
    no_queries = [x[:, :, :length] for x, length in zip(inputs(3, 5), (0, 5, 5), strict=True)]
    assert attention(*no_queries, backend=backend).shape == (2, 2, 0, 24)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_repeated_key_counts_as_often_as_it_stands_for(backend, dtype):
    q, k, v = inputs(4, 6, dtype=dtype)
    written_out = [torch.cat([x, x[:, :, -1:].expand(-1, -1, 99, -1)], dim=2) for x in (k, v)]
    exact = attention(q.float(), *(x.float() for x in written_out), backend="reference")
    repeated = attention(q, k, v, LastKeyRepeats(100), backend=backend)
    budget = 1e-5 if dtype == torch.float32 else 0.005
    assert repeated.dtype == dtype and (repeated - exact).abs().max() <= budget
    assert (attention(q, k, v, backend=backend) - exact).abs().max() > 0.1


@pytest.mark.parametrize("backend", ON_CPU)
def test_padding_sees_itself_and_nobody_else_sees_it(backend):
    keep = torch.tensor([[True] * 5, [False, False, True, True, True]])
    q, k, v = inputs(5, 5, heads=(2, 2))
    mask = CausalMask() & KeyMask(keep) | SelfMask()
    seen = attention(q, k, v, mask, backend=backend)
    torch.testing.assert_close(seen[1, :, :2], v[1, :, :2])
    without = attention(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], CausalMask(), backend="reference")
    torch.testing.assert_close(seen[1:, :, 2:], without)


def test_causal_queries_do_not_see_later_keys():
    q, k, v = inputs(5, 5)
    before = attention(q, k, v, CausalMask())
    k[:, :, 3:] += 1
    assert torch.equal(attention(q, k, v, CausalMask())[:, :, :3], before[:, :, :3])


def run_on_gpu(backend: str, mask: str, dtype: torch.dtype, with_gradients: bool) -> None:
    """Gradients of kernels that keep their output in half precision are allowed three times the error."""
    tensors, mask = case(mask, dtype, head_dim=64, device="cuda")
    leaves = [x.detach().requires_grad_(with_gradients) for x in tensors]
    if reasons := BACKENDS[backend].objections(*leaves, mask):
        pytest.skip("; ".join(reasons))
    assert_as_exact_as_plain(tensors, mask, backend, with_gradients, factor=3.0 if with_gradients else 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "xformers", "triton"])
def test_backends_are_as_exact_as_plain_pytorch_on_a_gpu(backend, mask, dtype, with_gradients):
    run_on_gpu(backend, mask, dtype, with_gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["orders with private keys", "packed", "joined", "a repeated key"])
def test_compiled_flex_attention_is_as_exact_as_plain_pytorch(mask):
    run_on_gpu("flex", mask, torch.bfloat16, with_gradients=True)


@pytest.mark.gpu
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "causal, one query"])
@pytest.mark.parametrize("backend", [name for name in DIFFERENTIABLE + INFERENCE_ONLY if "sage" not in name])
def test_backends_of_diffusers_are_as_exact_as_plain_pytorch(backend, mask, with_gradients):
    run_on_gpu(backend, mask, torch.bfloat16, with_gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [KeyMask(ragged(40)), KeyMask.prefix([40, 6], 40), tree(40)])
@pytest.mark.parametrize("backend", ["sdpa", "xformers", "flex", "triton"])
def test_what_hidden_keys_hold_does_not_leak_on_a_gpu(backend, mask: AttentionMask):
    q, k, v = inputs(5, 40, head_dim=64, dtype=torch.bfloat16, device="cuda")
    if reasons := BACKENDS[backend].objections(q, k, v, mask):
        pytest.skip("; ".join(reasons))
    seen = mask.dense(5, 40, q.device).any(dim=2)[..., None]
    clean, poisoned = (
        attention(q, *(x.masked_fill(~seen, held) for x in (k, v)), mask, backend=backend)
        for held in (0.0, float("nan"))
    )
    assert torch.equal(poisoned, clean) and clean.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "xformers", "flex", "triton"])
def test_queries_that_see_nothing_get_zeros_on_a_gpu(backend):
    mask = KeyMask(torch.tensor([[True] * 16, [False] * 16]))
    q, k, v = inputs(4, 16, head_dim=64, dtype=torch.bfloat16, device="cuda")
    if reasons := BACKENDS[backend].objections(q, k, v, mask):
        pytest.skip("; ".join(reasons))
    out = attention(q, k, v, mask, backend=backend)
    assert out[0].any() and not out[1].any()
