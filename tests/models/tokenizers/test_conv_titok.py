import pytest
import torch

from vistok import ConvTiTok
from vistok.tokens import Tokens

SMALL = {
    "image_size": 32,
    "num_tokens": 10,
    "levels": (4, 4, 3),
    "dim": 32,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "num_heads": 2,
    "conv_dim": 16,
    "conv_depth": 1,
}


@pytest.fixture
def tokenizer() -> ConvTiTok:
    torch.manual_seed(0)
    return ConvTiTok(**SMALL).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def test_shapes_ranges_and_independence_of_the_batch(tokenizer):
    tokens = tokenizer.encode(images())
    assert tokens.data.shape == (3, 10) and tokens.codebook_size == tokenizer.codebook_size == 48
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (3, 3, 32, 32) and decoded.abs().max() <= 1
    assert torch.equal(tokenizer.encode(images()[1:2]).data, tokens.data[1:2])
    torch.testing.assert_close(tokenizer.decode(tokens[1:2]), decoded[1:2], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_save_and_load_are_bit_exact(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = ConvTiTok.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encoder(images()), tokenizer.encoder(images()))
    assert loaded.identity() == tokenizer.identity()


def test_identity_changes_with_any_weight_and_not_with_precision(tokenizer):
    before = tokenizer.identity()
    tokenizer.to(torch.bfloat16).to(torch.float32)
    assert tokenizer.identity() == before
    with torch.no_grad():
        tokenizer.decoder.head[0].bias[0] += 1
    assert tokenizer.identity() != before


def test_every_parameter_gets_a_gradient(tokenizer):
    reconstruction, quantized = tokenizer(images(), torch.tensor([10, 4, 1]))
    (reconstruction - images()).square().mean().backward()
    assert quantized.indices.shape == (3, 10)
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@torch.inference_mode()
def test_bfloat16_runs_and_keeps_the_image_range(tokenizer):
    tokenizer.to(torch.bfloat16)
    decoded = tokenizer.decode(tokenizer.encode(images()))
    assert decoded.dtype == torch.bfloat16 and decoded.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 16, 32), r"takes images \[b 3 32 32\]"),
        (torch.zeros(3, 32, 32), r"takes images \[b 3 32 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating point"),
        (torch.full((1, 3, 32, 32), 200.0), r"lie in \[-1, 1\]"),
        (torch.full((1, 3, 32, 32), float("nan")), "finite"),
    ],
)
def test_bad_images_are_refused(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (Tokens(indices=torch.zeros(1, 10, dtype=torch.int64), codebook_size=99), "another tokenizer"),
        (Tokens(indices=torch.zeros(1, 11, dtype=torch.int64), codebook_size=48), "decodes 1 to 10 tokens"),
        (Tokens(latents=torch.zeros(1, 10, 3)), "does not decode continuous latents"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused(tokenizer, tokens, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(tokens)


def test_sizes_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="multiple of the patch size"):
        ConvTiTok(image_size=30)


@torch.inference_mode()
def test_lengths_decode_together_as_one_by_one(tokenizer):
    torch.nn.init.normal_(tokenizer.decoder.dropped_embedding)
    tokens = tokenizer.encode(images(), num_tokens=[10, 3, 1])
    together = tokenizer.decode(tokens)
    for i, length in enumerate([10, 3, 1]):
        alone = tokenizer.decode(tokenizer.encode(images()[i : i + 1], length))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together, tokenizer.decode(tokenizer.encode(images())), atol=1e-3)


@torch.inference_mode()
def test_cut_off_tokens_and_what_lies_in_the_padding_do_not_matter(tokenizer):
    tokens = tokenizer.encode(images())
    lengths = torch.tensor([4, 10, 2])
    changed = torch.where(tokens.keep(lengths).is_token, tokens.data, 47 - tokens.data)
    other = Tokens(indices=changed, codebook_size=48, lengths=lengths)
    assert torch.equal(tokenizer.decode(other), tokenizer.decode(tokens.keep(lengths)))
