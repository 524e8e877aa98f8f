"""VQGAN: the tokenizer's contract, its geometry, and what the constructor refuses."""

from __future__ import annotations

import pytest
import torch

from vistok import VQGAN
from vistok.tokens import Layout, Tokens

SMALL = {
    "image_size": 32,
    "codebook_size": 24,
    "codebook_dim": 4,
    "latent_dim": 16,
    "dim": 32,
    "dim_mults": (1, 2, 1),
    "depth": 1,
}


@pytest.fixture
def tokenizer() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(**SMALL).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def test_shapes_ranges_and_independence_of_the_batch(tokenizer):
    tokens = tokenizer.encode(images())
    assert tokens.data.shape == (3, 64) and tokens.layout == Layout((8, 8)) and tokens.codebook_size == 24
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (3, 3, 32, 32) and decoded.abs().max() <= 1
    assert torch.equal(tokenizer.encode(images()[1:2]).data, tokens.data[1:2])
    torch.testing.assert_close(tokenizer.decode(tokens[1:2]), decoded[1:2], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_tokens_run_row_by_row_over_the_grid(tokenizer):
    tokens = tokenizer.encode(images(1))
    changed = tokens.data.clone()
    changed[0, 8 * 6 + 1] = (changed[0, 8 * 6 + 1] + 1) % 24  # row 6, column 1: below and left
    other = Tokens(indices=changed, codebook_size=24, layout=tokens.layout)
    difference = (tokenizer.decode(other) - tokenizer.decode(tokens)).abs().amax(dim=1)[0]  # [H W]
    row, column = divmod(int(difference.argmax()), 32)
    assert row >= 16 and column < 16


@torch.inference_mode()
def test_save_and_load_are_bit_exact(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = VQGAN.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encode_latents(images()), tokenizer.encode_latents(images()))
    assert torch.equal(loaded.codebook, tokenizer.codebook)
    assert loaded.identity() == tokenizer.identity()


@torch.inference_mode()
def test_codes_have_unit_length_whatever_is_stored(tokenizer):
    tokens = tokenizer.encode(images())
    decoded = tokenizer.decode(tokens)
    tokenizer.quantizer.embedding.weight.mul_(torch.linspace(0.5, 3, 24)[:, None])
    assert torch.equal(tokenizer.encode(images()).data, tokens.data)
    torch.testing.assert_close(tokenizer.decode(tokens), decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(24))


@torch.inference_mode()
def test_latents_and_codes_may_have_any_grid(tokenizer):
    latents = tokenizer.encode_latents(images(1)[:, :, :16, :24])
    assert latents.shape == (1, 4, 4, 6)
    assert tokenizer.decode_codes(latents).shape == (1, 3, 16, 24)


def test_every_parameter_gets_a_gradient(tokenizer):
    reconstruction, quantized = tokenizer(images())
    ((reconstruction - images()).square().mean() + quantized.loss).backward()
    assert quantized.indices.shape == (3, 64)
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias before a GroupNorm of one channel per group, and the bias of keys, change nothing
    assert [name for name in without if not name.endswith(("conv1.bias", "key.bias"))] == []


@torch.inference_mode()
def test_bfloat16_runs_and_keeps_the_image_range(tokenizer):
    tokenizer.to(torch.bfloat16)
    decoded = tokenizer.decode(tokenizer.encode(images()))
    assert decoded.dtype == torch.bfloat16 and decoded.isfinite().all()
    reconstructions, _ = tokenizer(images().bfloat16())
    assert reconstructions.dtype == torch.bfloat16 and reconstructions.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 16, 32), r"takes images \[b 3 32 32\]"),
        (torch.full((1, 3, 32, 32), 2.0), r"lie in \[-1, 1\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating point"),
    ],
)
def test_wrong_images_are_refused(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad)


def test_tokens_of_another_grid_or_codebook_are_refused(tokenizer):
    indices = torch.zeros(1, 64, dtype=torch.int64)
    with pytest.raises(ValueError, match="laid out as sequence"):
        tokenizer.decode(Tokens(indices=indices, codebook_size=24))
    with pytest.raises(ValueError, match="codebook of 25"):
        tokenizer.decode(Tokens(indices=indices, codebook_size=25, layout=Layout((8, 8))))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 30}, "30 is not a multiple of 4"), ({"dim": 48}, "dim 48 is not a multiple of 32")],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VQGAN(**SMALL | change)
