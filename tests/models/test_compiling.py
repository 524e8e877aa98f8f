"""Compiled models compute what they computed before; later steps and lengths reuse the programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.eval.test_tokenizer_speed import FLEXTOK, TITOK
from vistok.decoding.flow_sampling import generate_flow
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.mar_sampling import generate_mar
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.decoding.streams import ImageStreams
from vistok.eval.random_weights import randomize
from vistok.models import compiling
from vistok.models.compiling import compile_model
from vistok.models.generators.any_order import AnyOrderMasked
from vistok.models.generators.mar import MAR
from vistok.models.generators.maskgit import MaskGITBert, MaskGITUViT
from vistok.models.generators.xar import XAR
from vistok.models.heads.diffusion import DiffusionHead
from vistok.models.tokenizers.flextok import FlexTok
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.models.tokenizers.titok import TiTok
from vistok.models.tokenizers.vqgan import VQGAN
from vistok.tokens import Tokens

MASKED = {"codebook_size": 24, "num_classes": 5, "num_tokens": 12, "dim": 32, "num_heads": 4, "mlp_dim": 64}
CONTINUOUS = {"latent_dim": 3, "num_tokens": 16, "layout": "4x4", "num_classes": 5, "dim": 32, "num_heads": 4}
CONV = {"image_size": 16, "dim": 32, "dim_mults": (1, 1), "depth": 1}
MAKE: dict[str, Callable[[], Any]] = {
    "bert": lambda: MaskGITBert(depth=1, **MASKED),
    "uvit": lambda: MaskGITUViT(depth=2, **MASKED),
    "any-order": lambda: AnyOrderMasked(depth=1, layout="3x4", **MASKED),
    "xar": lambda: XAR(order="cells-2", encoder_depth=1, decoder_depth=1, mlp_dim=40, **CONTINUOUS),
    "mar": lambda: MAR(
        num_buffer_tokens=2,
        encoder_depth=1,
        decoder_depth=1,
        mlp_dim=40,
        denoiser_dim=16,
        denoiser_depth=1,
        **CONTINUOUS,
    ),
    "flextok": lambda: FlexTok(**FLEXTOK | {"num_tokens": 64}),
    "titok": lambda: TiTok(**TITOK),
    "maskgit-vqgan": lambda: MaskGITVQGAN(codebook_size=20, codebook_dim=6, **CONV),
    "vqgan": lambda: VQGAN(codebook_size=20, codebook_dim=6, **CONV),
    "kl": lambda: KLTokenizer(image_size=16, latent_channels=3, dims=(4, 8), depth=1, num_groups=2),
}


OPTIONS = ((40, 4), (50, 5))  # tokens per image, of a tokenizer of any length, and steps


def make(name: str) -> Any:
    torch.manual_seed(0)
    return randomize(MAKE[name]()).eval()


@torch.no_grad()
def run(model: Any, batch_size: int, length: int = 40, num_steps: int = 4) -> Tensor:
    """What a loop draws, or a tokenizer decodes."""
    streams, labels = ImageStreams.from_seeds(range(batch_size)), torch.arange(batch_size) % 5
    guided = {"streams": streams, "guidance": ConstantGuidance(2.0)}
    if isinstance(model, XAR):
        return generate_flow(model, labels, num_inference_steps=num_steps, **guided).data
    if isinstance(model, MAR):
        steps = {"num_steps": num_steps, "num_inference_steps": 3, "head": DiffusionHead(0.0, 500)}
        return generate_mar(model, labels, **steps, **guided).data
    if hasattr(model, "mask_token_id"):
        return generate_masked(model, labels, sampling=MaskedSamplingParams(num_steps), **guided)
    if isinstance(model, KLTokenizer):
        latents = torch.randn(batch_size, 64, 3, generator=torch.Generator().manual_seed(0))
        return model.decode(Tokens(latents=latents, layout=model.layout))
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(model.codebook_size, (batch_size, model.num_tokens), generator=generator)
    tokens = Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout)
    if isinstance(model, FlexTok):
        lengths = [length - row for row in range(batch_size)]
        return model.decode(tokens.keep(lengths), num_inference_steps=num_steps)
    return model.decode(tokens)


@pytest.mark.parametrize("name", MAKE)
def test_all_that_a_loop_calls_goes_through_the_table(name: str) -> None:
    """Programs run here without a compiler, and change nothing."""
    model = make(name)
    expected = run(model, 2)
    with torch.compiler.set_stance("force_eager"):
        compiled = compile_model(model)
        compiled.warm_up(2)
        torch.testing.assert_close(run(model, 2), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match=f"this {type(model).__name__} is compiled already"):
            compile_model(model)
    compiled.undo()
    assert torch.equal(run(model, 2), expected)
    compile_model(model)


@pytest.mark.parametrize("name", MAKE)
def test_after_the_warm_up_nothing_is_compiled_again(name: str, monkeypatch) -> None:
    """Everything is traced as a whole; Inductor, which takes long, has its turn in the next test."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = make(name)
    expected = [run(model, 2, *options) for options in OPTIONS]
    monkeypatch.setattr(compiling, "SHORTEST_BUCKET", 64)  # of a tokenizer with 64 tokens: one bucket
    counters.clear()
    compile_model(model).warm_up(2)
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    for found, options in zip(expected, OPTIONS, strict=True):
        torch.testing.assert_close(run(model, 2, *options), found, atol=1e-4, rtol=1e-4)
    assert not counters["stats"].get("unique_graphs", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "xar", "mar", "flextok", "kl"])
def test_compiled_models_compute_the_same(name: str, monkeypatch) -> None:
    model = make(name)
    expected = [run(model, 2, *options) for options in OPTIONS]
    monkeypatch.setattr(compiling, "SHORTEST_BUCKET", 64)  # of a tokenizer with 64 tokens: one bucket
    compile_model(model)
    for found, options in zip(expected, OPTIONS, strict=True):
        torch.testing.assert_close(run(model, 2, *options), found, atol=1e-3, rtol=1e-3)


def test_calls_that_need_gradients_or_reuse_features_run_as_before() -> None:
    model = make("bert")
    compile_model(model)
    counters.clear()
    canvas = torch.full((2, 12), model.mask_token_id)
    model(canvas, torch.tensor([0, 1])).sum().backward()
    assert model.head.weight.grad is not None
    with torch.no_grad():
        model(canvas, torch.tensor([0, 1]), model.new_cache(2).evaluate_all(2))
    assert not counters["stats"].get("unique_graphs", 0)
    mar = make("mar")
    compile_model(mar)
    with torch.no_grad():
        mar.encoder(torch.zeros(1, 3, 32), mar.encoder.new_cache(1))
    assert not counters["stats"].get("unique_graphs", 0)


def test_lengths_are_rounded_up_to_powers_of_two() -> None:
    decoder = make("flextok").decoder
    bucketed = compiling._Bucketed(decoder.kept_registers)
    for length, bucket in ((1, 32), (32, 32), (33, 64), (64, 64)):
        registers = bucketed(torch.zeros(1, length, 3), torch.tensor([length]))
        assert registers.hidden_states.shape[1] == bucket + (bucket < 64)
        assert registers.num_last == (64 - bucket or 1)


def test_a_model_without_such_methods_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="Linear has no methods that can be compiled; those of AnyOrderMasked, MaskedGenerator",
    ):
        compile_model(torch.nn.Linear(2, 2))
