"""`encode` with a number of tokens, a limit or a target, and `decode_stream`, for every tokenizer."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.models.tokenizers.length_search import psnr
from vistok.tokens import Tokens

NUM_TOKENS = 16


class RowTokenizer(ImageTokenizer):
    """Token i is the mean of row i in 32 steps; rows without a token are grey. A generator adds noise."""

    image_size = NUM_TOKENS
    num_tokens = NUM_TOKENS
    codebook_size = 33
    variable_length = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(16.0))

    def encode_all(self, images: Tensor) -> Tokens:
        self.check_images(images)
        levels = (images.mean(dim=(1, 3)) * self.scale).round() + 16
        return Tokens(indices=levels.long().clamp(0, 32), codebook_size=33)

    def decode(self, tokens: Tokens, *, generator: torch.Generator | None = None) -> Tensor:
        self.check_tokens(tokens)
        levels = (tokens.data - 16) / self.scale * tokens.is_token  # [b n]
        rows = torch.zeros(len(tokens), NUM_TOKENS)
        rows[:, : levels.shape[1]] = levels
        if generator is not None:
            rows = rows + 0.01 * torch.randn(rows.shape, generator=generator)
        return rows[:, None, :, None].expand(-1, 3, -1, NUM_TOKENS).clamp(-1, 1)


class FixedTokenizer(RowTokenizer):
    variable_length = False


def rows(num_images: int = 3, seed: int = 0) -> Tensor:
    """Images whose rows are of one colour: more tokens are never worse."""
    values = torch.rand(num_images, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return values[:, None, :, None].expand(-1, 3, -1, NUM_TOKENS).contiguous()


def curve(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """PSNR of every prefix, measured one length at a time, `[b n]`."""
    tokens = tokenizer.encode(images)
    values = [psnr(tokenizer.decode(tokens.keep(n)), images) for n in range(1, tokenizer.num_tokens + 1)]
    return torch.stack(values, dim=1)


@torch.no_grad()
def test_number_of_tokens_for_all_or_for_each():
    tokenizer, images = RowTokenizer(), rows()
    whole = tokenizer.encode(images)
    assert whole.token_counts.tolist() == [16] * 3
    assert tokenizer.encode(images, 5).token_counts.tolist() == [5] * 3
    assert tokenizer.encode(images, [1, 16, 7]).token_counts.tolist() == [1, 16, 7]
    assert torch.equal(tokenizer.encode(images, max_tokens=4).data, whole.data[:, :4])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.floats(3, 45))
@torch.no_grad()
def test_a_target_gives_the_shortest_prefix_that_meets_it(seed, target):
    tokenizer, images = RowTokenizer(), rows(seed=seed)
    qualities = curve(tokenizer, images)
    tokens = tokenizer.encode(images, target_psnr=target)
    for image, quality in enumerate(qualities.tolist()):
        good = [length for length, value in enumerate(quality, start=1) if value >= target]
        assert int(tokens.token_counts[image]) == min(good, default=NUM_TOKENS)


@settings(deadline=None, max_examples=15)
@given(st.floats(5, 12))
@torch.no_grad()
def test_a_decoder_that_is_not_monotone_keeps_the_promise(target):
    torch.manual_seed(0)
    sizes = {
        "dim": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "conv_dim": 8,
        "conv_depth": 1,
    }
    tokenizer = ConvTiTok(image_size=16, num_tokens=7, levels=(4, 4), **sizes).eval()
    for parameter in tokenizer.decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = rows(4)
    tokens = tokenizer.encode(images)
    choice = tokenizer.choose_lengths(images, tokens, target_psnr=target)
    qualities = curve(tokenizer, images)
    tolerance = 0.01  # dB: images of other lengths in the batch move a rounding now and then
    for quality, length, is_met in zip(qualities, choice.lengths.tolist(), choice.is_met, strict=True):
        if is_met:
            assert quality[length - 1] >= target - tolerance
            assert length == 1 or quality[length - 2] < target + tolerance
        else:
            assert length == 7 and quality[-1] < target + tolerance


@torch.no_grad()
def test_a_target_out_of_reach_keeps_all_tokens_and_says_so(caplog):
    tokenizer, images = RowTokenizer(), rows()
    images[0] = 0  # comes back exactly, with one token
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer.encode(images, target_psnr=90)
    assert tokens.token_counts.tolist() == [1, 16, 16]
    assert "2 of 3 images miss the target" in caplog.text
    choice = tokenizer.choose_lengths(images, tokenizer.encode(images), target_psnr=90, max_tokens=5)
    assert choice.lengths.tolist() == [1, 5, 5] and choice.is_met.tolist() == [True, False, False]


@torch.no_grad()
def test_a_limit_holds_with_a_target():
    tokenizer, images = RowTokenizer(), rows()
    free = tokenizer.encode(images, target_psnr=15).token_counts
    limited = tokenizer.encode(images, target_psnr=15, max_tokens=9).token_counts
    assert (free > 9).any() and torch.equal(limited, free.clamp(max=9))


@torch.no_grad()
def test_a_perceptual_target_takes_any_distance():
    tokenizer, images = RowTokenizer(), rows()

    def distance(reconstructions: Tensor, originals: Tensor) -> Tensor:
        assert torch.equal(originals, images)
        return (reconstructions - originals).abs().mean(dim=(1, 2, 3))

    tokens = tokenizer.encode(images, target_lpips=0.2, perceptual_distance=distance)
    whole = tokenizer.encode(images)
    for image, length in enumerate(tokens.token_counts.tolist()):
        distances = [distance(tokenizer.decode(whole.keep(n)), images)[image] for n in (length - 1, length)]
        assert distances[0] > 0.2 >= distances[1]


@torch.no_grad()
def test_every_prefix_is_measured_with_the_same_noise():
    tokenizer, images = RowTokenizer(), rows()
    draws = torch.Generator().manual_seed(3)
    before = draws.get_state()
    tokens = tokenizer.encode(images, target_psnr=15, decode_options={"generator": draws})
    assert torch.equal(draws.get_state(), before)  # so that decoding now gives the picture that was measured
    assert (psnr(tokenizer.decode(tokens, generator=draws), images) >= 15).all()


@torch.no_grad()
def test_a_stream_is_decoded_from_growing_prefixes():
    tokenizer, images = RowTokenizer(), rows()
    tokens = tokenizer.encode(images, [16, 3, 11])
    stream = [*tokenizer.decode_stream(tokens)]
    for length, shown in zip((1, 2, 4, 8, 16), stream, strict=True):
        assert torch.equal(shown, tokenizer.decode(tokens.keep(length)))
    assert torch.equal(stream[2][1], stream[4][1])  # the image of three tokens is complete
    assert len([*tokenizer.decode_stream(tokens.keep(11))]) == 5  # 1, 2, 4, 8 and 11
    first, second = tokenizer.decode_stream(tokens, (3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"1\.\.16"):
        tokenizer.decode_stream(tokens, (1, 17))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"num_tokens": 3, "target_psnr": 20}, "not both"),
        ({"num_tokens": 3, "max_tokens": 4}, "not both"),
        ({"target_psnr": 20, "target_lpips": 0.1}, "either target_psnr or target_lpips"),
        ({"target_psnr": float("nan")}, "not a number"),
        ({"target_psnr": 20, "max_tokens": 17}, r"1\.\.16"),
        ({"max_tokens": 0}, r"1\.\.16"),
        ({"num_tokens": [1, 2, 0]}, r"1\.\.16"),
        ({"num_tokens": [1, 2]}, "3 of them, one per image"),
        ({"num_tokens": 2.5}, "one integer"),
    ],
)
@torch.no_grad()
def test_lengths_that_make_no_sense_are_refused(length, message):
    with pytest.raises(ValueError, match=message):
        RowTokenizer().encode(rows(), **length)


@torch.no_grad()
def test_a_tokenizer_of_fixed_length_has_no_choice():
    tokenizer, images = FixedTokenizer(), rows()
    tokens = tokenizer.encode(images)
    assert torch.equal(tokenizer.encode(images, 16).data, tokens.data)
    for length, message in (
        ({"num_tokens": 3}, "always uses 16 tokens, not 3"),
        ({"max_tokens": 3}, "always uses 16 tokens"),
        ({"target_psnr": 20}, "no length to choose"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(images, **length)
    with pytest.raises(ValueError, match="only all 16 tokens"):
        tokenizer.decode_stream(tokens)
