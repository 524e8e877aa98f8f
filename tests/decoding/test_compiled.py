"""Compiled steps draw what plain ones draw, and no step of them waits for the device."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from tests.host_sync import no_host_sync
from vistok.decoding.compiled import CACHE_BUCKET, CompiledGenerator
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.streams import ImageStreams
from vistok.eval.random_weights import randomize
from vistok.kernels.decode_attention import decode_attention
from vistok.models.generators.any_order import AnyOrderAR
from vistok.models.generators.base import OrderedGenerator
from vistok.models.generators.flex_ar import FlexARClass
from vistok.models.generators.llamagen import LlamaGenClass, LlamaGenText
from vistok.models.generators.nar import NARClass
from vistok.models.generators.text_ar import TextAR
from vistok.models.generators.text_features import TextFeatures

GRID = {
    "codebook_size": 24,
    "num_tokens": 16,
    "dim": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_dim": 32,
}


def class_labels(batch_size: int) -> torch.Tensor:
    return torch.arange(batch_size) % 3


def t5_features(batch_size: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(1)
    keep = torch.arange(5) < torch.tensor([3, 5, 2, 4])[:batch_size, None]
    return TextFeatures(torch.randn(batch_size, 5, 12, generator=generator), keep)


def text_bytes(batch_size: int) -> torch.Tensor:
    return torch.randint(97, 120, (batch_size, 16), generator=torch.Generator().manual_seed(1))


def make_model(name: str) -> tuple[OrderedGenerator, object]:
    """A tiny model with random weights, and what makes conditions for it."""
    torch.manual_seed(0)
    models = {
        "llamagen": (lambda: LlamaGenClass(num_classes=3, num_kv_heads=2, **GRID), class_labels),
        "llamagen-text": (lambda: LlamaGenText(text_dim=12, max_text_length=6, **GRID), t5_features),
        "nar": (lambda: NARClass(num_classes=3, **GRID), class_labels),
        "flex-ar": (lambda: FlexARClass(num_classes=3, **GRID), class_labels),
        "text-ar": (lambda: TextAR(text_length=16, **GRID), text_bytes),
    }
    make, condition = models[name]
    return randomize(make()).eval(), condition


def generate(model, condition, guidance_scale: float = 2.0, **options):
    streams = ImageStreams.from_seeds(range(len(condition)))
    guidance = ConstantGuidance(guidance_scale)
    return generate_ordered(model, condition, streams=streams, guidance=guidance, **options).indices


@pytest.mark.parametrize("name", ["llamagen", "llamagen-text", "nar", "flex-ar", "text-ar"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_steps_that_are_compiled_draw_the_same_tokens(name, guidance_scale):
    model, condition = make_model(name)
    with torch.compiler.set_stance("force_eager"):
        compiled = CompiledGenerator(model)
        for batch_size in (1, 3):
            rows = condition(batch_size)
            expected = generate(model, rows, guidance_scale)
            assert torch.equal(generate(compiled, rows, guidance_scale), expected)


@pytest.mark.parametrize("name", ["llamagen", "llamagen-text", "nar", "flex-ar", "text-ar"])
def test_no_step_waits_for_the_device(name, monkeypatch):
    # What runs uncompiled on a CPU looks at the lengths, which are there already.
    static = functools.partial(decode_attention, backend="reference")
    monkeypatch.setattr("vistok.models.layers.layer_cache.decode_attention", static)
    model, condition = make_model(name)
    compiled = CompiledGenerator(model)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        cache = compiled.new_cache(2)
        compiled.prefill(condition(2), cache)
        fed = [torch.ones(2, len(positions), dtype=torch.int64) for positions in model.order.plan()[:-1]]
        with no_host_sync():
            for indices in fed:
                compiled.step(indices, cache)


@pytest.mark.parametrize("name", ["llamagen", "nar"])
def test_compiled_programs_serve_all_steps_and_other_lengths(name):
    model, condition = make_model(name)
    compiled = CompiledGenerator(model)
    compiled.warm_up(condition(4))
    counters.clear()
    assert torch.equal(generate(compiled, condition(2)), generate(model, condition(2)))
    if name == "llamagen":
        for num_tokens in (3, [5, 16]):
            drawn = generate(compiled, condition(2), num_tokens=num_tokens)
            assert torch.equal(drawn, generate(model, condition(2), num_tokens=num_tokens))
    assert counters["stats"]["unique_graphs"] == 0


def test_lengths_share_buckets():
    model = LlamaGenClass(**GRID | {"num_tokens": 400}, num_classes=3).eval()
    compiled = CompiledGenerator(model)
    assert compiled.new_cache(1, 3).state.max_length == 1 + CACHE_BUCKET
    assert compiled.new_cache(1, CACHE_BUCKET + 1).state.max_length == 1 + 2 * CACHE_BUCKET
    assert compiled.new_cache(1).state.max_length == 1 + 400


def test_a_cache_that_is_full_says_so():
    model, condition = make_model("llamagen")
    compiled = CompiledGenerator(model)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        cache = compiled.new_cache(1)
        compiled.prefill(condition(1), cache)
        for _ in range(16):
            compiled.step(torch.zeros(1, 1, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match="holds 17 positions, 18 were asked for"):
            compiled.step(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_generators_without_such_steps_are_refused():
    model = AnyOrderAR(**GRID, layout="4x4", num_classes=3)
    with pytest.raises(ValueError, match="AnyOrderAR has no steps that can be compiled"):
        CompiledGenerator(model)


def test_logits_that_are_no_distribution_name_step_and_image():
    model, condition = make_model("llamagen")

    def spoil(logits):
        spoil.step += 1
        return (
            logits.masked_fill((torch.arange(2) == 1)[:, None, None], float("nan"))
            if spoil.step > 3
            else logits
        )

    spoil.step = 0
    with pytest.raises(ValueError, match="at step 3 of 16 the logits of row 1 were no distribution"):
        generate(model, condition(2), logits_processor=spoil)


def test_an_empty_batch_is_refused():
    model, condition = make_model("llamagen")
    with pytest.raises(ValueError, match="the batch is empty"):
        generate(model, condition(2)[:0])


def test_sampling_settings_hold_for_compiled_steps_too():
    model, condition = make_model("llamagen")
    compiled = CompiledGenerator(model)
    sampling = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
    with torch.compiler.set_stance("force_eager"):
        drawn = generate(compiled, condition(3), sampling=sampling)
    assert torch.equal(drawn, generate(model, condition(3), sampling=sampling))


def test_programs_follow_the_weights_of_a_model_that_changes():
    model, condition = make_model("llamagen")
    compiled = CompiledGenerator(model)
    with torch.compiler.set_stance("force_eager"):
        generate(compiled, condition(1))
        before = compiled._programs
        generate(compiled, condition(2))
        assert compiled._programs is before
        model.to(torch.float64)
        assert torch.equal(generate(compiled, condition(2)), generate(model, condition(2)))
        assert compiled._programs is not before


def test_what_lies_behind_the_end_of_an_image_does_not_count():
    model, condition = make_model("llamagen")

    def spoil(logits):
        spoil.step += 1
        return (
            logits.masked_fill((torch.arange(2) == 0)[:, None, None], float("nan"))
            if spoil.step > 5
            else logits
        )

    spoil.step = 0
    drawn = generate(model, condition(2), logits_processor=spoil, num_tokens=[5, 16])
    assert drawn[0, 5:].eq(0).all()
    spoil.step = 0
    with pytest.raises(ValueError, match="at step 5 of 16 the logits of row 0"):
        generate(model, condition(2), logits_processor=spoil, num_tokens=[6, 16])
