from __future__ import annotations

import pytest
import torch

from vistok import FlexARClass, MaskGITBert
from vistok.decoding.given import Given
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Generator
from vistok.tokens import Tokens

LABELS = torch.tensor([3, 1, 4])
SIZES = {"codebook_size": 20, "num_classes": 5, "num_tokens": 6, "dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(params=[FlexARClass, MaskGITBert])
def model(request) -> Generator:
    torch.manual_seed(0)
    model = request.param(**SIZES, mlp_dim=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def draw(model: Generator, **options) -> torch.Tensor:
    streams = ImageStreams.from_seeds([10, 11, 12])
    if isinstance(model, MaskGITBert):
        return generate_masked(model, LABELS, streams=streams, sampling=MaskedSamplingParams(4), **options)
    tokens = generate_ordered(model, LABELS, streams=streams, **options)
    assert isinstance(tokens, Tokens)
    return tokens.data


def test_given_tokens_stay_and_the_others_follow_them(model) -> None:
    plain = draw(model)
    keep = torch.tensor([[1, 1, 0, 0, 1, 0], [0] * 6, [1] * 6]).bool()
    given = Given((plain + 7) % 20, keep)
    drawn = draw(model, given=given)
    assert torch.equal(drawn[keep], given.indices[keep])
    assert torch.equal(drawn[1], plain[1])  # nothing of it is given, and its neighbours change nothing
    assert not torch.equal(drawn[0, ~keep[0]], plain[0, ~keep[0]])
    assert drawn.max() < 20


def test_rows_of_a_masked_model_have_their_own_schedules() -> None:
    torch.manual_seed(0)
    model = MaskGITBert(**SIZES, mlp_dim=48).eval()
    keep = torch.arange(6) < torch.tensor([[0], [3], [5]])
    counts = []
    draw(
        model,
        given=Given(torch.zeros(3, 6, dtype=torch.int64), keep),
        on_step=lambda step, indices: counts.append((indices == model.mask_token_id).sum(dim=1)),
    )
    masked = torch.stack(counts, dim=1)
    assert (masked[:, 0] < torch.tensor([6, 3, 2])).all() and (masked.diff(dim=1) <= 0).all()
    assert (masked[:, -1] == 0).all() and (masked[:2, -2] > 0).all()


def test_tokens_that_do_not_fit_are_refused(model) -> None:
    indices = torch.zeros(3, 6, dtype=torch.int64)
    keep = torch.ones(3, 6, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"keep must be boolean \[3, 6\], one entry per token, got torch.bool \[3, 5\]"
    ):
        Given(indices, keep[:, :5])
    with pytest.raises(ValueError, match=r"given indices must be int64 \[b n\], got torch.float32"):
        Given(indices.float(), keep)
    with pytest.raises(ValueError, match=r"given tokens must be \[3 6\], got \[3, 5\]"):
        draw(model, given=Given(indices[:, :5], keep[:, :5]))
    with pytest.raises(ValueError, match=r"given token ids must lie in 0..19, got 20 to 20"):
        draw(model, given=Given(indices + 20, keep))


def test_a_logits_processor_has_the_last_word(model) -> None:
    shapes = set()

    def only_even(logits: torch.Tensor) -> torch.Tensor:
        shapes.add((len(logits), logits.shape[-1], logits.dtype))
        return logits.masked_fill(torch.arange(20) % 2 == 1, float("-inf"))

    drawn = draw(model, logits_processor=only_even)
    assert (drawn % 2 == 0).all() and (draw(model) % 2 == 1).any()
    assert shapes == {(3, 20, torch.float32)}


def test_top_k_above_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k 21 is larger than the vocabulary of 20"):
        token_probabilities(torch.zeros(2, 20), SamplingParams(top_k=21))
    assert token_probabilities(torch.zeros(2, 20), SamplingParams(top_k=20)).shape == (2, 20)
