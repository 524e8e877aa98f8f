"""One-D-Piece: any prefix of the tokens decodes, mixed in one batch as alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vistok
from vistok.models.tokenizers.one_d_piece import OneDPiece
from vistok.models.tokenizers.titok import TiTok
from vistok.tokens import Tokens

CONFIG = {
    "image_size": 16,
    "num_tokens": 9,
    "encoder_patch_size": 8,
    "encoder_dim": 24,
    "encoder_depth": 1,
    "encoder_num_heads": 3,
    "decoder_patch_size": 4,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "codebook_size": 20,
    "codebook_dim": 6,
    "pixel_codebook_size": 11,
    "pixel_codebook_dim": 7,
    "pixel_dim": 32,
    "pixel_dim_mults": (1, 2, 1),
    "pixel_depth": 1,
}
LENGTHS = [9, 1, 4]


@pytest.fixture
def model() -> OneDPiece:
    torch.manual_seed(0)
    model = OneDPiece(**CONFIG).eval()
    for parameter in model.parameters():  # fresh biases are zero and would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_mixed_lengths_decode_together_as_one_by_one(model: OneDPiece, images: Tensor) -> None:
    tokens = model.encode(images)
    together = model.decode(tokens.keep(LENGTHS))
    for i, length in enumerate(LENGTHS):
        alone = model.decode(tokens[i : i + 1].keep(length))
        # the tolerance of the release's images: matrix products sum in another order for another number of rows
        torch.testing.assert_close(together[i : i + 1], alone, atol=5e-5, rtol=0)
    assert (together[1:] - model.decode(tokens)[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # lengths matter


@torch.no_grad()
def test_all_tokens_decode_as_titok_does(model: OneDPiece, images: Tensor) -> None:
    titok = TiTok(**CONFIG).eval()
    titok.load_state_dict(model.state_dict())
    tokens = model.encode(images)
    assert torch.equal(titok.encode(images).data, tokens.data)
    assert torch.equal(titok.decode(tokens), model.decode(tokens))
    with pytest.raises(ValueError, match="decodes exactly 9 tokens"):
        titok.decode(tokens.keep(4))


@torch.no_grad()
def test_a_prefix_is_part_of_the_whole(model: OneDPiece, images: Tensor) -> None:
    whole = model.encode(images)
    assert torch.equal(model.encode(images, num_tokens=4).data, whole.data[:, :4])
    mixed = model.encode(images, num_tokens=torch.tensor(LENGTHS))
    assert mixed.token_counts.tolist() == LENGTHS
    assert torch.equal(mixed.data, whole.data.masked_fill(~mixed.is_token, 0))


@torch.no_grad()
def test_indices_in_the_padding_do_not_matter(model: OneDPiece, images: Tensor) -> None:
    tokens = model.encode(images)
    lengths = torch.tensor(LENGTHS)
    other = torch.where(tokens.keep(lengths).is_token, tokens.data, 19 - tokens.data)
    poisoned = Tokens(indices=other, lengths=lengths, codebook_size=20)
    assert torch.equal(model.decode(poisoned), model.decode(tokens.keep(lengths)))


def test_packing_changes_no_gradient_and_padding_never_leaks(model: OneDPiece) -> None:
    model.double()  # the gradients of a random model are large
    codes = torch.randn(3, 9, 6, generator=generator(), dtype=torch.float64)
    poisoned = codes.clone()
    for row, length in zip(poisoned, LENGTHS, strict=True):
        row[length:] = float("nan")
    weights = [*model.decoder.parameters()]

    leaf = poisoned.requires_grad_()
    together = model.decode_codes(leaf, LENGTHS)
    packed = torch.autograd.grad(together.sin().sum(), [leaf, *weights])

    leaf = codes.clone().requires_grad_()
    alone = torch.cat([model.decode_codes(leaf[i : i + 1, :n]) for i, n in enumerate(LENGTHS)])
    expected = torch.autograd.grad(alone.sin().sum(), [leaf, *weights])

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    for mine, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_training_drops_the_tail_that_the_generator_draws(model: OneDPiece, images: Tensor) -> None:
    codes = model.quantizer.quantize(model.encode_latents(images)).codes
    model.train()
    kept = set()
    for seed in range(60):
        length = int(torch.randint(1, 10, (), generator=generator(seed)))
        kept.add(length)
        if seed < 4:
            reconstruction, quantized = model(images, generator=generator(seed))
            assert torch.equal(reconstruction, model.decode_codes(codes[:, :length]))
            assert quantized.indices.shape == (3, 9)  # the quantiser sees all tokens
    assert kept == set(range(1, 10))  # both ends are drawn
    assert torch.equal(model(images, tail_token_drop=False)[0], model.decode_codes(codes))
    before = torch.get_rng_state()
    model(images, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_nothing_is_dropped_in_evaluation(model: OneDPiece, images: Tensor) -> None:
    draws = generator()
    reconstruction, quantized = model(images, generator=draws)
    assert torch.equal(reconstruction, model.decode_codes(quantized.codes))
    assert torch.equal(draws.get_state(), generator().get_state())


def test_gradients_reach_every_parameter(images: Tensor) -> None:
    torch.manual_seed(0)
    model = OneDPiece(**CONFIG).train()
    reconstruction, quantized = model(images, tail_token_drop=False)
    ((reconstruction - images).square().mean() + quantized.loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_saved_models_come_back_exactly(model: OneDPiece, images: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = vistok.load(tmp_path)
    assert type(loaded) is OneDPiece and loaded.variable_length
    assert loaded.identity() == model.identity()
    tokens = model.encode(images, num_tokens=LENGTHS)
    assert torch.equal(loaded.encode(images, num_tokens=LENGTHS).data, tokens.data)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


@torch.no_grad()
def test_lengths_that_cannot_be_are_refused(model: OneDPiece, images: Tensor) -> None:
    for length in (0, 10, [9, 0, 1], [1, 2]):
        with pytest.raises(ValueError, match=r"num_tokens must be"):
            model.encode(images, num_tokens=length)
    with pytest.raises(ValueError, match="decodes 1 to 9 tokens"):
        model.decode(Tokens(indices=torch.zeros(1, 10, dtype=torch.int64), codebook_size=20))
