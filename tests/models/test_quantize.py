"""Weights in 8 bits: which layers, how near to the original, and what can no longer be done."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vistok
from tests.tiny import save_tiny_pipeline
from vistok.models.identity import model_identity
from vistok.models.quantize import large_layers, quantize_weights

SIZES = {"codebook_size": 200, "num_tokens": 16, "dim": 64, "depth": 2, "num_heads": 2, "mlp_dim": 96}


def make_generator(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = vistok.LlamaGenClass(num_classes=5, **(SIZES | changes))
    nn.init.normal_(model.head.weight, std=0.2)
    return model.eval().to(dtype)


def logits(model: Any) -> torch.Tensor:
    indices = torch.randint(200, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(torch.tensor([0, 3, 5]), indices)


def test_the_layers_of_the_blocks_become_int8_and_nothing_else() -> None:
    model = quantize_weights(make_generator())
    stored = {name for name, weight in model.named_parameters() if hasattr(weight, "qdata")}
    layers = ("attn.qkv", "attn.proj", "mlp.gate", "mlp.up", "mlp.down")
    assert stored == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers}
    assert (
        model.head.weight.numel() > model.blocks[0].attn.proj.weight.numel()
    )  # it is not its size that spares it


def test_small_layers_stay() -> None:
    layers = large_layers(make_generator(mlp_dim=63))
    assert "blocks.0.attn.qkv" in layers and "blocks.0.mlp.up" not in layers


def test_every_output_channel_has_a_scale_of_its_own() -> None:
    model = make_generator()
    weight = model.blocks[0].mlp.up.weight
    with torch.no_grad():
        weight[7] *= 1000
    original = weight.detach().clone()
    stored = quantize_weights(model).blocks[0].mlp.up.weight
    assert stored.qdata.dtype == torch.int8 and stored.qdata.shape == original.shape
    scales = original.abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(stored.scale.float(), scales, rtol=0.01, atol=0)
    error = (stored.dequantize() - original).abs()
    assert bool((error <= 0.51 * scales).all()) and error.max() > 0  # half a step, and a little for the scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_near_those_of_the_original(dtype: torch.dtype) -> None:
    exact = logits(make_generator())
    quantized = logits(quantize_weights(make_generator(dtype)))
    deviation = (quantized - exact).std() / exact.std()
    assert 0 < deviation < 0.03


def test_a_quantized_generator_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = vistok.ConvTiTok(
        image_size=16, num_tokens=16, levels=(5, 40), dim=16, num_heads=2, conv_dim=8, conv_depth=1
    )
    generator = vistok.TextAR(**SIZES, text_length=16)
    pipeline = vistok.TextToImagePipeline(tokenizer.eval(), generator.eval(), guidance_scale=2.0)
    plain = pipeline("a", num_images_per_prompt=3, output_type="tokens").images.data
    quantize_weights(generator)
    drawn = pipeline("a", num_images_per_prompt=3, output_type="tokens").images.data
    assert torch.equal(drawn, pipeline("a", num_images_per_prompt=3, output_type="tokens").images.data)
    assert (drawn == plain).float().mean() > 0.5
    with pytest.raises(ValueError, match="quantized weights are not saved"):
        pipeline.save_pretrained(tmp_path / "quantized")


def test_it_takes_a_quarter_of_the_memory() -> None:
    model = make_generator(dim=256, mlp_dim=704)
    blocks = copy.deepcopy(model.blocks)
    quantize_weights(model)

    def size(module: nn.Module) -> int:
        weights = [module.state_dict()[name] for name in module.state_dict()]
        parts = [
            part
            for weight in weights
            for part in ((weight.qdata, weight.scale) if hasattr(weight, "qdata") else (weight,))
        ]
        return sum(part.numel() * part.element_size() for part in parts)

    assert 0.25 < size(model.blocks) / size(blocks) < 0.26


def test_what_a_quantized_model_does_and_refuses(tmp_path: Path) -> None:
    original = make_generator(torch.bfloat16)
    model = quantize_weights(copy.deepcopy(original))
    assert model_identity(model) == model_identity(original)
    assert (model.dtype, model.device) == (torch.bfloat16, original.device)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    other = quantize_weights(make_generator(torch.bfloat16, num_kv_heads=2))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert model.to("meta").blocks[0].attn.qkv.weight.device.type == "meta"
    for change in (lambda: model.to(torch.float32), model.half, model.float):
        with pytest.raises(ValueError, match="quantized model"):
            change()
    with pytest.raises(ValueError, match="quantized already"):
        quantize_weights(model)
    with pytest.raises(ValueError, match="save the model as it is before quantize_weights"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_unknown_quantization_and_models_without_large_layers() -> None:
    with pytest.raises(ValueError, match="unknown quantization 'int4'; choose one of int8"):
        quantize_weights(make_generator(), "int4")
    with pytest.raises(ValueError, match="LlamaGenClass has no linear layers of 4096 weights in its blocks"):
        quantize_weights(make_generator(dim=16, mlp_dim=16))


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = make_generator()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[quant\]'"):
        quantize_weights(model)
    assert not getattr(model, "is_quantized", False)


def test_loading_a_pipeline_quantizes_its_generator() -> None:
    pipeline = vistok.load("emoji-64", dtype=torch.bfloat16, quantization="int8")
    assert pipeline.transformer.is_quantized and not getattr(pipeline.tokenizer, "is_quantized", False)
    assert hasattr(pipeline.transformer.blocks[0].down.weight, "qdata")
    assert pipeline.transformer.norm.weight.dtype == pipeline.tokenizer.dtype == torch.bfloat16


def test_a_wrong_quantization_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown quantization '4 bits'"):
        vistok.load(tmp_path / "nothing", quantization="4 bits")
    folder = save_tiny_pipeline(tmp_path / "tiny", seed=0)
    with pytest.raises(ValueError, match="TextAR has no linear layers"):
        vistok.load(folder, quantization="int8")
