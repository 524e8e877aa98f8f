"""Whole images on a device: the same as on the CPU, no waiting in the loops, and no more memory than they need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vistok
from tests.gpu.running import never_waits
from tests.pipelines.families import CONTINUOUS, FAMILIES, draw, is_same, make_pipeline, prompts_of
from vistok.decoding.compiled import CompiledGenerator
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.streams import ImageStreams
from vistok.eval.peak_memory import MIB, peak_memory
from vistok.eval.random_weights import randomize
from vistok.kernels.sampling import sample_tokens
from vistok.models.generators.base import OrderedGenerator
from vistok.models.generators.llamagen import LlamaGenClass
from vistok.models.generators.nar import NARClass

ALL = [*FAMILIES, *CONTINUOUS]
HALF_ERROR = 0.05  # of the largest logit: bfloat16 has 8 bits, and two blocks add up their roundings
SIZES = {"codebook_size": 512, "num_tokens": 64, "num_classes": 10, "dim": 128, "depth": 2, "num_heads": 4}
KINDS = {"llamagen": LlamaGenClass, "nar": NARClass}


def make_model(kind: str, device: torch.device, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A small generator with random weights."""
    torch.manual_seed(0)
    return randomize(KINDS[kind](**SIZES | {"mlp_dim": 256} | sizes)).eval().to(device, dtype)


def generate(model: Any, batch_size: int, **options: Any) -> Tensor:
    """Tokens `[b n]` with guidance, on the CPU."""
    labels, streams = torch.arange(batch_size), ImageStreams.from_seeds(range(batch_size))
    guidance = ConstantGuidance(2.0)
    return generate_ordered(model, labels, streams=streams, guidance=guidance, **options).indices.cpu()


@pytest.mark.parametrize("family", ALL)
def test_a_device_draws_what_the_cpu_draws(device: torch.device, family: str) -> None:
    """In float32: noise comes from the CPU, and PyTorch does not round products to TF32 unless told to."""
    prompts, pipeline = prompts_of(family, 3), make_pipeline(family)
    expected = draw(pipeline, prompts, guidance_scale=2.0, seed=3)
    drawn = draw(pipeline.to(device), prompts, guidance_scale=2.0, seed=3)
    assert drawn.device.type == device.type
    assert is_same(drawn.cpu(), expected)


@pytest.mark.parametrize("family", ALL)
def test_images_of_a_device(device: torch.device, family: str) -> None:
    prompts, pipeline = prompts_of(family, 2), make_pipeline(family)
    expected = pipeline(prompts, seed=3, output_type="pt").images
    images = pipeline.to(device)(prompts, seed=3, output_type="pt").images.cpu()
    assert (images - expected).abs().max() < 1e-2  # cuDNN may round the inputs of convolutions to TF32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close_to_float32(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    indices = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for model in (make_model(kind, device), make_model(kind, device, dtype)):
        cache, plan = model.new_cache(2), model.order.plan()
        steps = [model.prefill(torch.arange(2, device=device), cache)]
        steps += [model.step(indices[:, positions], cache) for positions in plan[:-1]]
        logits.append(torch.cat(steps, dim=1).float())
    exact, rounded = logits
    assert exact.std() > 1e-2
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < error < HALF_ERROR


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_draws_do_not_make_the_host_wait(device: torch.device, kind: str) -> None:
    model = make_model(kind, device)
    plan = [positions.to(device) for positions in model.order.plan()]
    uniforms = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.tensor([1, 2, 10, 10], device=device)
    drawn = []
    for waiting in (_anything, never_waits):  # the first compiles kernels
        cache = model.new_cache(4)
        logits = model.prefill(labels, cache)
        indices = torch.zeros(2, 64, dtype=torch.int64, device=device)
        with waiting(device):
            for step, positions in enumerate(plan):
                indices[:, positions] = sample_tokens(
                    logits, uniforms[:, positions], guidance_scale=2.0, top_k=40
                )
                if step + 1 < len(plan):
                    logits = model.step(indices[:, positions].repeat(2, 1), cache)
        drawn.append(indices)
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 4


def _anything(_: torch.device) -> AbstractContextManager[None]:
    """A context that forbids nothing."""
    return nullcontext()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_on_cuda(cuda: torch.device, kind: str) -> None:
    """CUDA graphs of compiled steps draw the same tokens, for several batches, settings and lengths in turn."""
    model = make_model(kind, cuda)
    compiled = CompiledGenerator(model)
    sampling = SamplingParams(temperature=0.9, top_k=100, top_p=0.95)
    for batch_size in (2, 1, 2):
        for options in ({}, {"sampling": sampling}):
            expected = generate(model, batch_size, **options)
            assert torch.equal(generate(compiled, batch_size, **options), expected)
    if kind == "llamagen":
        assert torch.equal(generate(compiled, 2, num_tokens=20), generate(model, 2, num_tokens=20))
    half = make_model(kind, cuda, torch.bfloat16)
    drawn = generate(CompiledGenerator(half), 2)
    assert torch.equal(drawn, generate(CompiledGenerator(half), 2))  # of another capture


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_do_not_make_the_host_wait(cuda: torch.device, kind: str) -> None:
    model = make_model(kind, cuda)
    compiled = CompiledGenerator(model)
    labels = torch.tensor([1, 2], device=cuda)
    compiled.warm_up(labels)
    plan = [positions.to(cuda) for positions in model.order.plan()]
    indices = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0)).to(cuda)
    blocks = [indices[:, positions].contiguous() for positions in plan]
    cache = compiled.new_cache(2)
    compiled.prefill(labels, cache)
    with never_waits(cuda):
        for block in blocks[:-1]:
            compiled.step(block, cache)


@pytest.mark.gpu
def test_drawing_needs_the_memory_of_one_cache(cuda: torch.device) -> None:
    """Beyond the weights: caches of both branches, and of one step the logits and what a layer makes."""
    model: OrderedGenerator = make_model("llamagen", cuda, num_tokens=1024, depth=8)
    cache = model.new_cache(2 * 8)
    cache_mib = sum(tensor.numel() * tensor.element_size() for tensor in cache.tensors()) / MIB
    del cache
    generate(model, 8)
    first = peak_memory(lambda: generate(model, 8), cuda)
    second = peak_memory(lambda: generate(model, 8), cuda)
    assert first is not None and second is not None
    assert cache_mib < first < 1.25 * cache_mib + 16
    assert second == pytest.approx(first, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llamagen-class", "nar-text", "text-ar", "xar-cells", "mar"])
def test_offloaded_models_leave_the_device(cuda: torch.device, family: str) -> None:
    prompts, pipeline = prompts_of(family, 2), make_pipeline(family)
    expected = draw(pipeline, prompts, seed=3)
    pipeline.enable_model_cpu_offload(device=cuda)
    for _ in range(2):  # a pipeline can be called again
        assert is_same(draw(pipeline, prompts, seed=3).cpu(), expected)
        assert pipeline(prompts, seed=3, output_type="pt").images.shape == (2, 3, 16, 16)
    pipeline.maybe_free_model_hooks()
    devices = {
        p.device.type for part in (pipeline.transformer, pipeline.tokenizer) for p in part.parameters()
    }
    assert devices == {"cpu"}


@pytest.mark.gpu
def test_offloading_holds_one_model_at_a_time(cuda: torch.device) -> None:
    """The peak is well below the weights of both models."""
    torch.manual_seed(0)
    wide = {"num_classes": 5, "codebook_size": 20, "num_tokens": 16, "dim": 768, "depth": 6, "num_heads": 8}
    generator = randomize(LlamaGenClass(**wide, mlp_dim=1024)).eval()
    deep = {"codebook_dim": 4, "latent_dim": 8, "dim": 384, "dim_mults": (1, 1, 1), "depth": 1}
    tokenizer = vistok.VQGAN(image_size=16, codebook_size=20, **deep).eval()
    pipeline = vistok.ClassToImagePipeline(tokenizer, generator)
    pipeline.set_progress_bar_config(disable=True)
    sizes = [
        sum(weight.numel() * weight.element_size() for weight in model.parameters()) / MIB
        for model in (generator, tokenizer)
    ]
    assert min(sizes) > 0.4 * max(sizes)
    pipeline.enable_model_cpu_offload(device=cuda)

    def call() -> None:
        pipeline([0], seed=3, output_type="pt")
        pipeline.maybe_free_model_hooks()

    call()
    peak = peak_memory(call, cuda)
    assert peak is not None and 0.9 * max(sizes) < peak < max(sizes) + 0.5 * min(sizes)
