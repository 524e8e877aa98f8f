"""The benchmark of the families at tiny sizes, and that it compares equal things."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vistok.eval import tokenizer_speed
from vistok.eval.peak_memory import peak_memory
from vistok.eval.plain_tokenizers import PrefixCausalMask, plain_decode, plain_encode
from vistok.eval.tokenizer_speed import Way, build_tokenizer, main, measure, randomize
from vistok.models.layers.upsample import UpsampleConv
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.flextok import FlexTok
from vistok.models.tokenizers.one_d_piece import OneDPiece
from vistok.models.tokenizers.titok import TiTok
from vistok.tokens import Tokens

TITOK = {
    "image_size": 16,
    "num_tokens": 8,
    "encoder_patch_size": 8,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_num_heads": 2,
    "decoder_patch_size": 4,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "codebook_size": 20,
    "codebook_dim": 6,
    "pixel_codebook_size": 11,
    "pixel_codebook_dim": 7,
    "pixel_dim": 32,
    "pixel_dim_mults": (1, 1, 1),
    "pixel_depth": 1,
}
FLEXTOK = {
    "image_size": 16,
    "num_tokens": 8,
    "levels": (5, 4, 3),
    "encoder_dim": 16,
    "encoder_depth": 2,
    "decoder_dim": 24,
    "decoder_depth": 2,
    "head_dim": 8,
    "time_dim": 8,
    "scaling_factor": 0.7,
    "latent_channels": 3,
    "vae_dims": (4, 4, 8),
    "vae_depth": 1,
    "vae_num_groups": 2,
}
FAMILIES = {
    "titok": lambda: TiTok(**TITOK),
    "one-d-piece": lambda: OneDPiece(**TITOK),
    "flextok": lambda: FlexTok(**FLEXTOK),
}
NUM_STEPS = 2


def tiny(family: str) -> ImageTokenizer:
    torch.manual_seed(0)
    return randomize(FAMILIES[family]()).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_plain_composition_computes_the_same(family: str, images: Tensor):
    tokenizer = tiny(family)
    tokens = tokenizer.encode(images)
    assert torch.equal(plain_encode(tokenizer, images).data, tokens.data)
    options = {"num_inference_steps": NUM_STEPS} if family == "flextok" else {}
    cuts = [tokens, tokens.keep(3), tokens.keep([8, 1, 3])] if tokenizer.variable_length else [tokens]
    for cut in cuts:
        ours = tokenizer.decode(cut, **options)
        torch.testing.assert_close(plain_decode(tokenizer, cut, NUM_STEPS), ours, atol=1e-4, rtol=0)
        assert ours.std() > 1e-3  # something was computed


def test_registers_see_patches_and_what_precedes_them():
    mask = PrefixCausalMask(num_patches=2).dense(4, 4, torch.device("cpu"))[0, 0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_layers_that_start_at_zero_become_random():
    fresh = FlexTok(**FLEXTOK)
    assert not fresh.encoder.to_codes.weight.any()
    layers = [module for module in randomize(fresh).modules() if isinstance(module, nn.Linear)]
    assert all(layer.weight.any() for layer in layers)


@pytest.mark.parametrize(
    ("family", "operations"),
    [
        ("titok", ["encode", "decode 8 tokens"]),
        (
            "flextok",
            ["encode", "decode 8 tokens", "decode 4 tokens", "decode 8 and 4 tokens in one batch"],
        ),
    ],
)
def test_measurements(family: str, operations: list[str]):
    measured = list(measure(family, tiny(family), batch_size=2, repeats=1, num_steps=NUM_STEPS))
    assert [measurement.operation for measurement in measured] == operations
    for measurement in measured:
        assert measurement.family == family and measurement.batch_size == 2
        assert measurement.seconds > 0 and measurement.plain_seconds > 0 and measurement.difference < 1e-3


def test_different_results_are_not_timed(monkeypatch):
    def wrong(tokenizer, tokens, num_steps):  # of the plain composition
        return tokenizer.decode(tokens) + 0.1

    monkeypatch.setattr(tokenizer_speed, "plain_decode", wrong)
    with pytest.raises(
        ValueError, match="titok, decode 8 tokens, float32: ours and the plain composition differ by 0.1"
    ):
        list(measure("titok", tiny("titok"), batch_size=1, repeats=1))


def test_all_ways_are_measured_beside_one_plain_composition(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    ways = [Way(), Way(is_compiled=True), Way(torch.bfloat16)]
    tokenizer = tiny("flextok")
    options = {"batch_size": 1, "repeats": 1, "num_steps": NUM_STEPS, "ways": ways}
    measured = list(measure("flextok", tokenizer, **options))
    assert [m.way for m in measured] == ["float32", "float32, compiled", "bfloat16"] * 3
    assert [m.operation for m in measured[::3]] == ["encode", "decode 8 tokens", "decode 4 tokens"]
    for plain, compiled, narrow in zip(measured[::3], measured[1::3], measured[2::3], strict=True):
        assert plain.plain_seconds == compiled.plain_seconds == narrow.plain_seconds
        assert max(plain.difference, compiled.difference) < 1e-3 and narrow.difference < 0.5
    assert measured[-1].difference > 1e-3
    assert tokenizer.decoder.mask_vector.dtype == torch.float32  # the ways are copies
    assert "velocity" not in vars(tokenizer.decoder)


def test_low_precision_has_an_error_budget(monkeypatch):
    decode = FlexTok.decode
    monkeypatch.setattr(
        FlexTok,
        "decode",
        lambda self, tokens, **options: (
            decode(self, tokens, **options) + 0.5 * (self.dtype == torch.bfloat16)
        ),
    )
    with pytest.raises(
        ValueError, match="flextok, decode 8 tokens, bfloat16: ours and the plain composition"
    ):
        list(
            measure(
                "flextok", tiny("flextok"), batch_size=1, repeats=1, num_steps=1, ways=[Way(torch.bfloat16)]
            )
        )


def test_the_plain_convolution_is_put_back():
    tokenizer = tiny("titok")
    tokens = Tokens(indices=torch.zeros(1, 8, dtype=torch.int64), codebook_size=20)
    ours = tokenizer.decode(tokens)
    plain_decode(tokenizer, tokens)
    assert torch.equal(tokenizer.decode(tokens), ours)
    convs = [module for module in tokenizer.modules() if isinstance(module, UpsampleConv)]
    assert convs and not any("forward" in vars(conv) for conv in convs)


def test_an_unknown_family():
    with pytest.raises(ValueError, match="unknown family 'titok-xxl'; choose from titok-l-32"):
        build_tokenizer("titok-xxl")


def test_peak_memory_of_a_large_tensor():
    def allocate() -> None:
        torch.zeros(32 * 2**20).fill_(1)  # 128 MiB

    device = torch.device("cpu")
    peak = peak_memory(allocate, device)
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 120 < peak < 200
    assert peak_memory(lambda: None, device) < 20  # the earlier peak is forgotten


def test_the_report(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(tokenizer_speed, "build_tokenizer", tiny)
    out = tmp_path / "speed"
    main(["-o", str(out), "--families", "titok", "one-d-piece", "--repeats", "1", "--batch-size", "2"])
    stored = json.loads((out / "tokenizer-speed.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    assert len(stored["measurements"]) == 2 + 4 and stored["repeats"] == 1
    assert stored["parameters"]["titok"] == sum(weight.numel() for weight in tiny("titok").parameters())
    page = (out / "report.md").read_text()
    assert "| one-d-piece | decode 8 and 4 tokens in one batch | float32 |" in page
    assert "titok 0 M parameters" in page and stored["machine"] in page
