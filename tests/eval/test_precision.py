"""The measurements of precision and memory with small models: what they count and what they write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vistok
from vistok.eval import memory, precision
from vistok.eval.precision import (
    PRECISIONS,
    Pictures,
    compare_generators,
    compare_tokenizers,
    divergence,
    load_in,
    main,
)
from vistok.models.generators import llamagen
from vistok.tokens import Tokens

SIZES = {"dim": 64, "num_heads": 2, "mlp_dim": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = vistok.ConvTiTok(
        image_size=16,
        num_tokens=8,
        levels=(5, 4),
        dim=64,
        num_heads=2,
        encoder_depth=1,
        decoder_depth=1,
        conv_dim=8,
        conv_depth=1,
    )
    generator = vistok.TextAR(codebook_size=20, num_tokens=8, text_length=16, depth=2, **SIZES)
    pipeline = vistok.TextToImagePipeline(tokenizer, generator, guidance_scale=2.0, top_p=0.9)
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("models") / "tiny")
    return folder


@pytest.fixture
def drawn(model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pictures, Tokens]:
    monkeypatch.setattr(precision, "BATCH_SIZE", 4)
    pictures = Pictures(load_in(str(model), "float32", "cpu"), ["a", "b", "c"], num_images=2)
    return pictures, pictures.draw()


def test_divergence_by_hand() -> None:
    exact = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    other = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]])
    expected = torch.tensor([0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]).double()
    torch.testing.assert_close(divergence(exact, other), expected, atol=1e-6, rtol=0)
    assert bool((divergence(other, exact) > 10).all()) is False and divergence(other, exact)[1] > 10


def test_a_generator_does_not_differ_from_itself(drawn: tuple[Pictures, Tokens]) -> None:
    pictures, tokens = drawn
    again = pictures.pipeline(["a", "a", "b", "b", "c", "c"], seed=[0, 1] * 3, output_type="tokens").images
    assert torch.equal(tokens.data, again.data)
    effect = compare_generators(pictures, pictures, tokens)
    assert (effect.divergence, effect.same_top, effect.changed_draws) == (0, 1, 0)
    assert (effect.changed_tokens, effect.same_images) == (0, 1)


def test_another_generator_differs_in_everything(drawn: tuple[Pictures, Tokens], model: Path) -> None:
    pictures, tokens = drawn
    other = Pictures(load_in(str(model), "float32", "cpu"), pictures.prompts, num_images=2)
    torch.manual_seed(1)
    for weight in other.pipeline.transformer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    effect = compare_generators(pictures, other, tokens)
    assert effect.divergence > 0.1 and effect.same_top < 0.9
    assert effect.changed_draws > 0.1 and effect.changed_tokens > 0.1 and effect.same_images < 1


def test_a_tokenizer_is_compared_on_equal_tokens_and_pictures(
    drawn: tuple[Pictures, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, tokens = drawn
    images = pictures.decode(tokens)
    encoded = pictures.encode(images).clone()  # outside of inference mode
    effect = compare_tokenizers(pictures, tokens, images, encoded)
    assert (effect.psnr, effect.largest, effect.kept_tokens) == (None, 0, 1)
    changed = images.clone()
    changed[0, 0, 0, 0] = (int(changed[0, 0, 0, 0]) + 51) % 256
    difference = abs(int(changed[0, 0, 0, 0]) - int(images[0, 0, 0, 0]))
    monkeypatch.setattr(pictures, "decode", lambda _: changed)
    encoded[0, 0] = (encoded[0, 0] + 1) % 20
    effect = compare_tokenizers(pictures, tokens, images, encoded)
    assert effect.largest == difference
    expected = 10 * math.log10(255**2 / (difference**2 / images.numel()))
    assert effect.psnr == pytest.approx(expected)
    assert effect.kept_tokens == pytest.approx(1 - 1 / encoded.numel())


def test_the_command_writes_a_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-o", str(tmp_path), "--model", str(model), "--prompts", "a", "b", "--num-images", "1"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "precision.json").read_text())
    assert list(report["generator"]) == list(report["tokenizer"]) == list(PRECISIONS)
    sizes = {name: effect["weights_mib"] for name, effect in report["generator"].items()}
    assert sizes["bfloat16"] == pytest.approx(sizes["float32"] / 2)
    assert sizes["int8, bfloat16"] < sizes["int8, float32"] < sizes["float32"]
    assert report["generator"]["float32"]["divergence"] == 0 < report["generator"]["bfloat16"]["divergence"]
    assert 0 < report["generator"]["int8, float32"]["divergence"] < 1e-2
    page = (tmp_path / "report.md").read_text()
    assert "| int8, bfloat16 |" in page and "precision.png" in page
    assert (tmp_path / "precision.png").stat().st_size > 1000


def test_a_generator_of_classes_is_refused(tmp_path: Path) -> None:
    tokenizer = vistok.ConvTiTok(image_size=16, num_tokens=8, levels=(5, 4), dim=64, num_heads=2)
    generator = vistok.FlexARClass(codebook_size=20, num_tokens=8, num_classes=3, depth=1, **SIZES)
    vistok.ClassToImagePipeline(tokenizer, generator).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not draw texts that it reads itself"):
        precision.measure_precisions(str(tmp_path), ["a"], num_images=1)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llamagen.PRESETS, "B", {"depth": 2, **SIZES})
    monkeypatch.setitem(memory.NUM_TOKENS, 256, 16)


def test_counted_memory_is_what_is_there(small_sizes: None) -> None:
    counted = memory.count("B", 256)
    model: Any = memory.build(vistok.LlamaGenClass, torch.device("cpu"), depth=2, num_tokens=16, **SIZES)
    assert counted.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert counted.weights_mib["bfloat16"] * 2**20 == memory.stored_bytes(model) == 2 * counted.num_parameters
    memory.quantize_weights(model)
    assert counted.weights_mib["int8"] * 2**20 == memory.stored_bytes(model)
    layers = model.new_cache(2).layers
    assert counted.cache_mib * 2**20 == sum(2 * layer.keys.nbytes for layer in layers)
    assert memory.cache_mib(model, 3) == 3 * counted.cache_mib
    assert memory.cache_mib(model, 1, 7) * 2**20 == sum(
        2 * one.keys.nbytes for one in model.new_cache(2, 7).layers
    )


def test_the_memory_command_writes_a_report(small_sizes: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        memory,
        "VQGAN",
        lambda image_size: vistok.VQGAN(
            image_size=image_size,
            codebook_size=20,
            codebook_dim=4,
            latent_dim=8,
            dim=32,
            dim_mults=(1, 1),
            depth=1,
        ),
    )
    command = ["-o", str(tmp_path), "--sizes", "B", "--measure", "B", "--batch-sizes", "1", "--decode", "1"]
    memory.main(command)
    report = json.loads((tmp_path / "memory.json").read_text())
    assert [(row["size"], row["image_size"]) for row in report["counted"]] == [("B", 256), ("B", 384)]
    assert [(row["weights"], row["num_images"]) for row in report["drawing"]] == [
        ("bfloat16", 1),
        ("int8", 1),
    ]
    assert "| LlamaGen-B | int8 | 256 | 1 |" in (tmp_path / "report.md").read_text()
