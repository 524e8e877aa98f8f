import pytest
import torch

from vistok.kernels.attention import CausalMask, KeyMask, LastKeyRepeats, attention, attention_backend
from vistok.kernels.attention.backends import BACKENDS


def inputs(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(num_keys)
    shapes = [(2, 3, num_queries, 8), (2, 3, num_keys, 8), (2, 3, num_keys, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def masks(num_keys: int):
    keep = torch.ones(2, num_keys, dtype=torch.bool)
    keep[1, -1] = num_keys == 1
    return [None, CausalMask(), KeyMask(keep), CausalMask() & KeyMask(torch.ones_like(keep))]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (7, 7), (3, 17)])
def test_sdpa_computes_the_reference(num_queries, num_keys):
    for mask in masks(num_keys):
        q, k, v = (x.requires_grad_() for x in inputs(num_queries, num_keys))
        expected, actual = (attention(q, k, v, mask, backend=name) for name in ("reference", "sdpa"))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (expected, actual)]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(right, left, atol=1e-4, rtol=0)


def test_sdpa_stays_within_twice_the_error_of_plain_bf16():
    q, k, v = inputs(31, 31, torch.bfloat16)
    exact = attention(q.float(), k.float(), v.float(), CausalMask(), backend="reference")
    budget = (attention(q, k, v, CausalMask(), backend="reference") - exact).abs().max()
    assert (attention(q, k, v, CausalMask(), backend="sdpa") - exact).abs().max() <= 2 * budget + 1e-5


def test_causal_queries_do_not_see_later_keys():
    q, k, v = inputs(5, 5)
    before = attention(q, k, v, CausalMask())
    k[:, :, 3:] += 1
    assert torch.equal(attention(q, k, v, CausalMask())[:, :, :3], before[:, :, :3])


def test_a_named_backend_runs_or_says_why_not():
    q, k, v = inputs(2, 2)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="available: auto, sdpa"):
        attention(q, k, v, backend="fast")
    with attention_backend("xformers"), pytest.raises(ValueError, match="needs CUDA tensors"):
        attention(q, k, v)
    attention(q, k, v)  # the choice ended with its block


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_key_counts_as_often_as_it_stands_for(backend, dtype):
    q, k, v = inputs(4, 6, dtype)
    written_out = [torch.cat([x, x[:, :, -1:].expand(-1, -1, 99, -1)], dim=2) for x in (k, v)]
    exact = attention(q.float(), *(x.float() for x in written_out), backend="reference")
    repeated = attention(q, k, v, LastKeyRepeats(100), backend=backend)
    budget = 1e-5 if dtype == torch.float32 else 0.02  # bf16 keeps 8 bits
    assert repeated.dtype == dtype and (repeated - exact).abs().max() <= budget
    assert (attention(q, k, v, backend=backend) - exact).abs().max() > 0.1


def test_key_mask_of_another_length_is_refused():
    q, k, v = inputs(2, 3)
    with pytest.raises(ValueError, match="covers 2 keys"):
        attention(q, k, v, KeyMask(torch.ones(2, 2, dtype=torch.bool)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_gpu_backends_compute_the_reference(name):
    q, k, v = (x.cuda() for x in inputs(64, 64, torch.bfloat16))
    for mask in (None, CausalMask()):
        if BACKENDS[name].objections(q, mask):
            pytest.skip(f"{name}: {BACKENDS[name].objections(q, mask)}")
        exact = attention(q.float(), k.float(), v.float(), mask, backend="reference")
        budget = (attention(q, k, v, mask, backend="reference") - exact).abs().max()
        assert (attention(q, k, v, mask, backend=name) - exact).abs().max() <= 2 * budget + 1e-5
