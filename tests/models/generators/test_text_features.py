from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vistok.models.generators.base import join_conditions
from vistok.models.generators.text_features import T5TextEncoder, TextFeatures, load_t5


def features(num_texts: int, length: int, dim: int = 4) -> TextFeatures:
    return TextFeatures(torch.randn(num_texts, length, dim), torch.ones(num_texts, length, dtype=torch.bool))


def test_joined_batches_are_padded_to_the_longer_one() -> None:
    short, long = features(1, 2), features(2, 5)
    for first, second in ((short, long), (long, short)):
        joined = join_conditions(first, second)
        assert joined.features.shape == (3, 5, 4)
        assert joined.keep.sum(dim=1).tolist() == [*first.keep.sum(dim=1), *second.keep.sum(dim=1)]
        assert torch.equal(
            joined.features[joined.keep],
            torch.cat([first.features.flatten(0, 1), second.features.flatten(0, 1)]),
        )


def test_repeated_rows_stay_together() -> None:
    two = features(2, 3)
    assert torch.equal(two.repeat_each(2).features, two.features[[0, 0, 1, 1]])


def test_wrong_features_are_refused() -> None:
    keep = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"floating point \[b s d\]"):
        TextFeatures(torch.zeros(2, 3), keep)
    with pytest.raises(ValueError, match=r"keep must be boolean \[2, 3\], got torch.int64"):
        TextFeatures(torch.zeros(2, 3, 4), keep.long())
    with pytest.raises(ValueError, match="no position to attend to"):
        TextFeatures(torch.zeros(2, 3, 4), keep & torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="4 and 5 wide come from different encoders"):
        features(1, 2).join(features(1, 2, dim=5))
    with pytest.raises(ValueError, match="conditions of different generators"):
        join_conditions(torch.zeros(1), features(1, 2))


class Encoder(nn.Module):
    """Each id becomes a vector filled with it."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=input_ids[..., None].expand(-1, -1, 3).float())


class Ids(SimpleNamespace):
    def to(self, device: torch.device) -> Ids:
        return self


def count_letters(texts: list[str], max_length: int | None, **options: object) -> Ids:
    """Stands for a tokenizer: one id per letter, and an end marker."""
    rows = [[*map(ord, text[: max_length and max_length - 1]), 1] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return Ids(input_ids=ids, attention_mask=(ids > 0).long())


def test_texts_become_features_with_their_mask() -> None:
    encoded = T5TextEncoder(count_letters, Encoder(), max_length=3)(["abcd", ""])
    assert encoded.keep.tolist() == [[True, True, True], [True, False, False]]
    assert encoded.features[0, :, 0].tolist() == [97, 98, 1]


def test_without_transformers_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install transformers sentencepiece.*features"):
        load_t5()


def test_without_weights_the_error_says_what_to_do(monkeypatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    fake = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=unreachable), T5EncoderModel=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(
        FileNotFoundError, match="google/flan-t5-xl could not be had .We couldn't connect.; download"
    ):
        load_t5()
