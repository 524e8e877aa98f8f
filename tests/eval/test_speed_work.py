"""Plain loops compute what the package does, and the counted work is that of torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vistok.decoding.guidance import LinearGuidance, PowerCosineGuidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.decoding.streams import ImageStreams
from vistok.eval.continuous_ways import MARFamily, XARFamily
from vistok.eval.plain_loops import plain_loop, plain_masked, plain_ordered
from vistok.eval.random_weights import randomize
from vistok.eval.speed_families import FAMILIES, build_subject, random_text
from vistok.eval.speed_floor import Pass, Rates, floor_seconds, is_bound_by_memory, measure_rates
from vistok.eval.speed_subjects import (
    ContinuousSubject,
    MaskedSubject,
    OrderedSubject,
    Subject,
    TokenizerSubject,
    random_indices,
)
from vistok.eval.speed_work import cache_bytes, count_flops, mean_of, ordered_passes, weight_bytes
from vistok.models.generators.any_order import AnyOrderAR
from vistok.models.generators.flex_ar import FlexARClass, FlexARText
from vistok.models.generators.llamagen import LlamaGenClass, LlamaGenText
from vistok.models.generators.mar import MAR
from vistok.models.generators.maskgit import MaskGITBert, MaskGITUViT
from vistok.models.generators.nar import NARClass
from vistok.models.generators.text_ar import TextAR
from vistok.models.generators.xar import XAR
from vistok.models.tokenizers.flextok import FlexTok
from vistok.models.tokenizers.vqgan import VQGAN

SIZES: dict[str, Any] = {"codebook_size": 50, "num_tokens": 64, "dim": 32, "num_heads": 2, "mlp_dim": 48}
TEXT = random_text(24)
FLEXTOK = {"image_size": 16, "num_tokens": 8, "levels": (5, 4, 3), "encoder_dim": 16, "encoder_depth": 1}
FLEXTOK |= {"decoder_dim": 24, "decoder_depth": 2, "head_dim": 8, "time_dim": 8, "scaling_factor": 0.7}
FLEXTOK |= {"latent_channels": 3, "vae_dims": (4, 4, 8), "vae_depth": 1, "vae_num_groups": 2}
STACKS: dict[str, Any] = {"num_tokens": 64, "layout": "8x8", "num_classes": 9, "dim": 32, "encoder_depth": 2}
STACKS |= {"decoder_depth": 3, "num_heads": 2, "mlp_dim": 48}


def tiny(model: Any) -> Any:
    return randomize(model).eval()


def text_ar() -> Subject:
    model = tiny(TextAR(**SIZES, depth=3))
    return OrderedSubject(model, lambda size: model.encode_text(["red apple"] * size))


def xar_family() -> XARFamily:
    model = XAR(**STACKS, order="cells-4")
    return XARFamily(tiny(model), num_inference_steps=6)


def mar_family() -> MARFamily:
    model = tiny(MAR(**STACKS, num_buffer_tokens=4, denoiser_dim=24, denoiser_depth=2))
    return MARFamily(model, draft=model, num_steps=8, num_inference_steps=5)


TINY = {
    "llamagen": lambda: OrderedSubject(
        tiny(LlamaGenClass(**SIZES, num_kv_heads=1, depth=3, num_classes=9)), torch.arange
    ),
    "llamagen-text": lambda: OrderedSubject(
        tiny(LlamaGenText(**SIZES, depth=3, text_dim=24, max_text_length=30)), TEXT
    ),
    "nar": lambda: OrderedSubject(tiny(NARClass(**SIZES, depth=3, num_classes=9)), torch.arange),
    "flexar": lambda: OrderedSubject(
        tiny(FlexARClass(**SIZES, depth=3, num_classes=9, qk_norm="rms")), torch.arange
    ),
    "flexar-text": lambda: OrderedSubject(
        tiny(FlexARText(**SIZES, depth=3, text_dim=24)), TEXT, TEXT, text_length=20
    ),
    "text-ar": text_ar,
    "maskgit": lambda: MaskedSubject(
        tiny(MaskGITBert(**SIZES, depth=2, num_classes=9)), 8, LinearGuidance(4.5)
    ),
    "maskgit-uvit": lambda: MaskedSubject(
        tiny(MaskGITUViT(**SIZES, depth=2, num_classes=9)), 8, PowerCosineGuidance(6.9, 2.8)
    ),
    "xar": lambda: ContinuousSubject(xar_family(), (1, 2), ""),
    "mar": lambda: ContinuousSubject(mar_family(), (1, 2), ""),
    "vqgan": lambda: TokenizerSubject(
        tiny(VQGAN(image_size=16, dim=32, dim_mults=(1, 1), depth=1, codebook_size=50))
    ),
    "flextok": lambda: TokenizerSubject(tiny(FlexTok(**FLEXTOK)), 4),
}


@pytest.fixture(params=TINY)
def subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    return TINY[request.param]()


def test_the_plain_way_computes_the_same(subject: Subject) -> None:
    plain, ours = subject.plain_outputs(), subject.outputs(subject.model)
    assert plain.std() > 1e-3  # something is computed
    assert (plain - ours).abs().max() < 1e-4 * plain.abs().max()
    subject.draw_plain(2, subject.shares[-1])


def test_ways_in_bfloat16_are_as_far_off_as_the_plain_one(subject: Subject) -> None:
    exact = subject.plain_outputs()
    subject.model.to(torch.bfloat16)
    plain, ours = (
        ((outputs - exact).square().mean() / exact.square().mean()).sqrt()
        for outputs in (subject.plain_outputs(), subject.outputs(subject.model))
    )
    assert 1e-4 < plain < 0.2 and ours <= 2 * plain


def test_the_work_is_what_torch_counts(subject: Subject) -> None:
    for share in subject.shares[:2]:
        counted = count_flops(lambda share=share: subject.draw(subject.model, 3, share))
        passes = subject.passes(3, share)
        # Of TextAR, the convolutions over the bytes of the prompt are not counted.
        slack = 0.1 if isinstance(subject.model, TextAR) else 1e-6
        assert sum(one.count * one.flops for one in passes) == pytest.approx(counted, rel=slack)
        assert all(one.bytes >= 0 for one in passes)


@pytest.mark.parametrize("family", ["llamagen", "llamagen-text", "nar", "flexar", "flexar-text", "text-ar"])
@torch.no_grad()
def test_plain_loops_follow_the_whole_order(family: str) -> None:
    torch.manual_seed(0)
    subject: Any = TINY[family]()
    model, indices = subject.model, random_indices(50, 2, 64)
    rows = subject._rows(2)
    loop, cache = plain_loop(model), model.new_cache(4)
    torch.testing.assert_close(loop.begin(rows), model.prefill(rows, cache), atol=1e-5, rtol=0)
    for positions in model.order.plan()[:-1]:
        fed = indices[:, positions].repeat(2, 1)
        torch.testing.assert_close(loop.follow(fed), model.step(fed, cache), atol=1e-5, rtol=0)


def test_plain_tokens_follow_the_distribution() -> None:
    """A model whose logits say one token draws that token."""
    torch.manual_seed(0)
    model = tiny(NARClass(**SIZES, depth=1, num_classes=9))
    with torch.no_grad():
        for name in ("right_head", "below_head"):
            getattr(model, name).weight[7] = 0
        for norm in (model.right_norm, model.below_norm):
            norm.weight.zero_()  # all logits are 0: every token is drawn
    drawn = plain_ordered(
        model,
        torch.tensor([1, 2, 9, 9]),
        num_steps=15,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert drawn.shape == (2, 64) and len(drawn.unique()) > 30


def test_plain_masked_draws_the_same_tokens() -> None:
    torch.manual_seed(0)
    model = tiny(MaskGITBert(**SIZES, depth=2, num_classes=9))
    options = {"sampling": MaskedSamplingParams(6, 3.0, True), "guidance": LinearGuidance(3.0)}
    ours, plain = (
        loop(model, torch.tensor([3, 8]), streams=ImageStreams.from_seeds([0, 1]), **options)
        for loop in (generate_masked, plain_masked)
    )
    assert torch.equal(ours, plain) and len(ours.unique()) > 10


def test_weights_that_a_pass_reads() -> None:
    model = LlamaGenClass(**SIZES, depth=2, num_classes=9)
    block = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32  # attention, MLP, norms
    weights = 2 * block + 32 + 32 * 50
    assert weight_bytes(model) == 4 * weights
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * weights
    first, second = ordered_passes(model, batch_size=3, num_steps=2)
    row = 2 * 2 * 32 * 2  # keys and values of two layers, bfloat16
    assert first.bytes == 2 * weights + 6 * (row + 4 * 50)
    assert second.bytes == 2 * weights + 6 * (2 * row + 4 * 50)
    assert cache_bytes(model, 3, num_tokens=10) == 6 * 11 * row


def test_the_head_of_text_ar_is_its_table() -> None:
    model = TextAR(**SIZES, depth=2)
    step = ordered_passes(model, batch_size=1, num_steps=2)[-1]
    cached = 2 * 2 * 2 * 32 * 34 * 4
    logits = 2 * 50 * 4
    assert step.bytes == weight_bytes(model.blocks, model.norm) + 4 * 32 * 50 + cached + logits


def test_steps_of_flextok_add_up() -> None:
    torch.manual_seed(0)
    subject = TINY["flextok"]()
    (rest, step), (same_rest, fewer) = subject.passes(2, 1), subject.passes(2, 2)
    assert (step.count, fewer.count) == (20, 10)
    assert (rest, step.bytes, step.flops) == (same_rest, fewer.bytes, fewer.flops)


def test_floor() -> None:
    rates = Rates(read=100.0, copy=80.0, matmul={"float32": 10.0, "bfloat16": 20.0})
    passes = [Pass(bytes=200, flops=10), Pass(bytes=100, flops=60, count=3)]
    assert floor_seconds(passes, rates, "float32") == pytest.approx(2 + 3 * 6)
    assert floor_seconds(passes, rates, "int8") == floor_seconds(passes, rates, "bfloat16") == 2 + 3 * 3
    assert not is_bound_by_memory(passes, rates, "float32")
    assert is_bound_by_memory(passes[:1], rates, "float32")
    assert mean_of(passes, "bytes") == 125 and mean_of(passes, "flops") == pytest.approx(190 / 4)


def test_rates_are_plausible() -> None:
    rates = measure_rates(torch.device("cpu"), ["float32", "int8"], num_bytes=2**22, sizes=[64], repeats=2)
    assert set(rates.matmul) == {"float32", "bfloat16"}
    assert 1e8 < rates.bandwidth < 1e13 and min(rates.matmul.values()) > 1e6


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="unknown family 'llamagen-z'; choose from llamagen-b"):
        build_subject("llamagen-z")
    other = AnyOrderAR(
        codebook_size=9, num_tokens=16, layout="4x4", num_classes=3, dim=16, depth=1, num_heads=2
    )
    with pytest.raises(ValueError, match="no plain loop for AnyOrderAR"):
        plain_loop(other)
    with pytest.raises(ValueError, match="the work of AnyOrderAR is not known"):
        ordered_passes(other, 1, 4)


def test_families_are_all_released_kinds() -> None:
    kinds = {"llamagen", "nar", "xar", "mar", "maskgit", "flexar", "emoji", "titok", "one", "flextok"}
    assert {name.split("-")[0] for name in FAMILIES} == kinds
