"""Which backend runs, and what the others say."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.attention_cases import MASKS, inputs, ragged
from vistok.kernels.attention import CausalMask, KeyMask, OrderMask, attention, attention_backend, dispatch
from vistok.kernels.attention.backends import BACKENDS

DIFFUSERS_NAMES = ("flash", "flash_hub", "_flash_3", "_native_cudnn", "sage", "sage_hub")


def preferences(mask, num_queries: int, num_keys: int, device: str, requires_grad: bool = False):
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, n, 64, device=device) for n in (num_queries, num_keys, num_keys))
        return dispatch._preferences(q.requires_grad_(requires_grad), k, v, mask)


def test_auto_goes_by_device_mask_and_gradients():
    for num_queries, num_keys, mask in MASKS.values():
        assert preferences(mask, num_queries, num_keys, "cpu") == ("sdpa",)
    for mask, num_queries in ((None, 5), (CausalMask(), 9), (CausalMask(), 1)):
        assert preferences(mask, num_queries, 9, "cuda") == ("sdpa",)
    assert preferences(CausalMask(), 5, 9, "cuda") == ("triton", "sdpa")
    assert preferences(KeyMask(ragged(9)), 5, 9, "cuda") == ("triton", "sdpa")
    assert preferences(KeyMask(ragged(9)), 5, 9, "cuda", requires_grad=True) == ("sdpa",)
    assert preferences(MASKS["packed"][2], 40, 40, "cuda") == ("xformers", "triton", "sdpa")


def test_heads_that_a_kernel_does_not_cover_go_to_the_next_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_preferences", lambda *_: ("triton", "sdpa"))
    dispatch._log_once.cache_clear()
    q, k, v = inputs(3, 5, head_dim=160)
    with caplog.at_level(logging.INFO, logger="vistok"):
        for _ in range(3):
            torch.testing.assert_close(attention(q, k, v), attention(q, k, v, backend="reference"))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["attention backend: sdpa (triton covers heads of up to 128 channels, got 160)"]
    with pytest.raises(ValueError, match="'triton' cannot run: covers heads of up to 128 channels, got 160"):
        attention(q, k, v, backend="triton")


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # of the interpreter
def test_auto_takes_the_first_without_objections(monkeypatch):
    taken = []
    monkeypatch.setattr(dispatch, "_preferences", lambda *_: ("xformers", "triton", "sdpa"))
    compute = type(BACKENDS["triton"]).__call__
    monkeypatch.setattr(type(BACKENDS["triton"]), "__call__", lambda *args: taken.append(1) or compute(*args))
    attention(*inputs(3, 5))  # xformers needs CUDA
    assert taken


def test_a_named_backend_runs_or_says_why_not():
    q, k, v = inputs(2, 2)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="available: auto, sdpa, xformers, flex, triton, reference, flash"):
        attention(q, k, v, backend="fast")
    with attention_backend("xformers"), pytest.raises(ValueError, match="needs CUDA tensors"):
        attention(q, k, v)
    attention(q, k, v)  # the choice ended with its block
    with pytest.raises(ValueError, match="needs CUDA tensors"):  # also where there is nothing to compute
        attention(q[:0], k[:0], v[:0], backend="xformers")


def test_all_reasons_are_listed():
    q, k, v = inputs(2, 5, head_dim=7, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        attention(q.requires_grad_(), k, v, MASKS["packed"][2], backend="xformers")
    for reason in ("needs CUDA", "float64", "multiple of 4 channels, got 7", "one packed row, got 2"):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="has no gradient on the CPU"):
        attention(*inputs(2, 5)[:2], inputs(2, 5)[2].requires_grad_(), backend="flex")
    with pytest.raises(ValueError, match="needs one of float32, float16, bfloat16, got torch.float64"):
        attention(q, k, v, backend="triton")


@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
def test_backends_of_diffusers_say_what_diffusers_says(name):
    q, k, v = inputs(2, 2)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        attention(q, k, v, backend=name)
    assert any("OrderMask" in reason for reason in BACKENDS[name].objections(q, k, v, MASKS["order"][2]))
    if not name.startswith("_native"):
        assert any(
            "install" in reason or "usable" in reason for reason in BACKENDS[name].objections(q, k, v, None)
        )
    q.requires_grad_()
    has_gradient = not any("no gradient" in reason for reason in BACKENDS[name].objections(q, k, v, None))
    assert has_gradient == (name in ("flash", "flash_hub", "_native_cudnn"))


def test_a_backend_of_diffusers_computes_what_it_covers():
    q, k, v = inputs(6, 6)
    for mask in (None, CausalMask()):
        expected = attention(q, k, v, mask, scale=0.3, backend="reference")
        torch.testing.assert_close(attention(q, k, v, mask, scale=0.3, backend="_native_math"), expected)
    one = attention(q[:, :, :1], k, v, CausalMask(), backend="_native_math")
    torch.testing.assert_close(one, attention(q[:, :, :1], k, v, backend="reference"))
    with pytest.raises(ValueError, match="as many queries as keys, got 3 and 6"):
        attention(q[:, :, :3], k, v, CausalMask(), backend="_native_math")


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(3, 5, heads=(6, 2))
    cases = {
        "each head of keys serves as many": (q[:, :3], k, v),
        "one value per key": (q, k, v[:, :, :4]),
        "same batch and channels": (q[:1], k, v),
        "tensors \\[batch heads positions channels\\], got q \\[6, 3, 24\\]": (q[0], k, v),
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError, match=message):
            attention(*tensors)


def test_attention_is_traced_as_a_whole():
    q, k, v = inputs(5, 5)
    ranks = torch.arange(5)
    for mask in (None, CausalMask(), OrderMask(ranks, ranks)):
        compiled = torch.compile(lambda *x, mask=mask: attention(*x, mask), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, mask))
