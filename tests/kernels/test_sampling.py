"""The sampling operator: the kernel, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tests.host_sync import no_host_sync
from vistok.decoding.guidance import apply_guidance
from vistok.decoding.sampling import SamplingParams, sample, token_probabilities
from vistok.kernels.sampling import sample_tokens
from vistok.kernels.triton_support import triton_objections

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    bool(triton_objections(DEVICE)), reason="Triton runs neither here nor in its interpreter"
)


def make(vocab_size: int, rows: int = 2, positions: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits `[2 * rows positions v]` of both branches of guidance, and uniforms `[rows positions]`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2 * rows, positions, vocab_size, generator=generator)
    return logits.to(DEVICE), torch.rand(rows, positions, generator=generator)


def both(logits: Tensor, uniforms: Tensor, **settings) -> tuple[Tensor, Tensor]:
    return tuple(
        sample_tokens(logits, uniforms, backend=name, **settings) for name in ("reference", "triton")
    )


FILTERS = {
    "none": {},
    "top-k": {"top_k": 7},
    "greedy": {"top_k": 1},
    "temperature": {"temperature": 0.7},
    "top-p": {"top_p": 0.8, "temperature": 1.3},
    "top-p of almost nothing": {"top_p": 1e-6},
    "both": {"top_k": 40, "top_p": 0.9},
}


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", FILTERS)
def test_reference_is_guidance_then_probabilities_then_a_draw(name: str, guidance_scale: float) -> None:
    logits, uniforms = make(1000, rows=3, positions=4)
    cond, uncond = logits.chunk(2)
    expected = sample(apply_guidance(cond, uncond, guidance_scale), SamplingParams(**FILTERS[name]), uniforms)
    scale = torch.tensor(guidance_scale, device=DEVICE)
    for one in (guidance_scale, scale, scale.expand(3, 1, 1), scale.expand(1, 4, 1)):
        assert torch.equal(sample_tokens(logits, uniforms, guidance_scale=one, **FILTERS[name]), expected)
    if guidance_scale == 1.0:
        assert torch.equal(sample_tokens(cond, uniforms, **FILTERS[name]), expected)


@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.9}, {"typical_p": 0.9}])
def test_reference_never_waits_for_the_device(settings: dict) -> None:
    logits, uniforms = make(50)
    with no_host_sync():
        sample_tokens(logits, uniforms, guidance_scale=torch.tensor(1.5), backend="reference", **settings)


@needs_triton
@pytest.mark.parametrize("name", FILTERS)
def test_kernel_gives_the_tokens_of_the_reference(name: str) -> None:
    logits, uniforms = make(1000)
    expected, found = both(logits[:2], uniforms, **FILTERS[name])
    assert torch.equal(found, expected)
    expected, found = both(logits, uniforms, guidance_scale=2.5, **FILTERS[name])
    assert torch.equal(found, expected)


@needs_triton
@pytest.mark.parametrize("vocab_size", [1, 2, 13, 16384])
def test_kernel_for_other_vocabularies(vocab_size: int) -> None:
    logits, uniforms = make(vocab_size, rows=1, positions=2)
    settings = {"top_k": min(2000, vocab_size), "guidance_scale": torch.tensor(3.0, device=DEVICE)}
    expected, found = both(logits.bfloat16(), uniforms, **settings)
    assert torch.equal(found, expected)
    expected, found = both(logits, uniforms, top_p=0.95, guidance_scale=3.0)
    assert torch.equal(found, expected)


@needs_triton
@pytest.mark.parametrize("name", ["none", "both"])
def test_long_rows_are_read_in_parts(name: str) -> None:
    from vistok.kernels.sampling.triton import triton_sample_tokens

    logits, uniforms = make(1000, seed=4)
    filters = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | FILTERS[name]
    expected = sample_tokens(logits, uniforms, guidance_scale=2.0, backend="reference", **filters)
    found = triton_sample_tokens(logits, uniforms, guidance_scale=2.0, largest_block=512, **filters)
    assert torch.equal(found, expected)


@needs_triton
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.9}])
def test_equal_logits_are_kept_as_the_reference_does(settings: dict) -> None:
    """Draws at equal distances come as often as the law says, which is known where many ids are alike."""
    logits = torch.tensor([0.0, -0.0, 2.0, 1.0, 1.0, float("-inf"), 1.0, 0.0, 2.0, 1.0], device=DEVICE)
    num = 12
    uniforms = (torch.arange(num) + 0.5) / num
    expected, found = both(logits.expand(1, num, -1), uniforms[None], **settings)
    assert torch.equal(found, expected)
    law = token_probabilities(logits.cpu(), SamplingParams(**settings))
    counts = found.flatten().cpu().bincount(minlength=len(law))
    assert (counts - num * law).abs().max() <= 1 and not counts[law == 0].any()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}])
def test_draws_of_the_kernel_follow_the_law(settings: dict) -> None:
    """Chi-square against the filtered probabilities; 24.3 is the 0.999 quantile at 7 degrees of freedom."""
    logits, _ = make(8, rows=1)
    num = 400
    uniforms = torch.rand(1, num, generator=torch.Generator().manual_seed(5))
    drawn = sample_tokens(logits[:1].expand(1, num, -1), uniforms, backend="triton", **settings)
    law = token_probabilities(logits[0, 0].cpu(), SamplingParams(**settings)).double()
    counts = drawn.flatten().cpu().bincount(minlength=8).double()
    assert not counts[law == 0].any()
    expected = num * law[law > 0]
    assert ((counts[law > 0] - expected).square() / expected).sum() < 24.3


@needs_triton
@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_extreme_uniforms_never_draw_an_impossible_id(edge: float) -> None:
    logits = torch.tensor([float("-inf"), 0.0, -200.0, 0.0, float("-inf")], device=DEVICE).expand(1, 1, -1)
    expected, found = both(logits, torch.tensor([[edge]]))
    assert torch.equal(found, expected) and found.item() in (1, 3)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "top_p": 0.9}])
def test_what_is_no_distribution_gives_minus_one(settings: dict) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, nan, 1.0], [nan] * 3, [inf, 0.0, 0.0], [-inf] * 3, [-inf, 3.0, -inf]]
    expected, found = both(torch.tensor([rows], device=DEVICE), torch.full((1, 5), 0.5), **settings)
    assert expected.tolist() == found.tolist() == [[-1, -1, -1, -1, 1]]


@needs_triton
def test_strides_and_empty_batches_do_not_matter() -> None:
    logits, uniforms = make(24, rows=2, positions=3)
    expected = sample_tokens(logits, uniforms, guidance_scale=2.0, backend="reference")
    swapped = logits.transpose(1, 2).contiguous().transpose(1, 2)  # the ids are not side by side
    for given in (swapped, torch.cat([logits, logits], dim=1)[:, 3:]):
        found = sample_tokens(given, uniforms, guidance_scale=2.0, backend="triton")
        assert torch.equal(found, expected)
    for found in both(logits[:0], uniforms[:0], top_k=3, top_p=0.5):
        assert found.shape == (0, 3) and found.dtype == torch.int64


@needs_triton
def test_kernel_is_one_opaque_operator_to_torch_compile() -> None:
    def step(logits: Tensor, uniforms: Tensor) -> Tensor:
        return sample_tokens(logits + 1, uniforms, top_k=3, guidance_scale=2.0, backend="triton")

    logits, uniforms = make(24)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, uniforms), step(logits, uniforms))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 9)}, r"logits must be \[r k v\]"),
        ({"logits": torch.zeros(3, 1, 9)}, "logits of 2 rows, or 4 with guidance"),
        ({"logits": torch.zeros(2, 1, 9), "guidance_scale": 2.0}, "needs unconditional logits"),
        ({"guidance_scale": torch.ones(3, 1, 1)}, r"guidance_scale must be \[\] or \[2 1 1\]"),
        ({"top_k": 10}, "top_k 10 is larger than the vocabulary of 9"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.2}, r"top_p must be in \(0, 1\]"),
        ({"backend": "cutlass"}, "unknown sampling backend 'cutlass'; available: auto, reference, triton"),
        ({"backend": "triton", "typical_p": 0.5}, "cannot run: .*typical_p"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    given = {"logits": torch.zeros(4, 1, 9), "uniforms": torch.zeros(2, 1)} | change
    with pytest.raises(ValueError, match=message):
        sample_tokens(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_kernel_asked_for_by_name_says_why_it_cannot_run(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    logits, uniforms = make(9)
    with pytest.raises(ValueError, match="sampling backend 'triton' cannot run: (needs CUDA|Triton is not)"):
        sample_tokens(logits, uniforms, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab_size", [1000, 16384, 64000, 262144])
def test_kernel_on_a_gpu(name: str, vocab_size: int) -> None:
    """All but the uniforms that lie within rounding of a boundary, of which 64 rows hardly have one."""
    logits, uniforms = make(vocab_size, rows=16, positions=4, seed=1)
    expected, found = both(logits.bfloat16(), uniforms.to(DEVICE), guidance_scale=1.8, **FILTERS[name])
    assert (found != expected).sum() <= 1
    with torch.cuda.device(DEVICE):
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample_tokens(logits, uniforms.to(DEVICE), guidance_scale=1.8, **FILTERS[name])
        finally:
            torch.cuda.set_sync_debug_mode("default")
