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


class Letters:
    """Stands for a tokenizer: one id per letter, and an end marker."""

    model_max_length = 8

    def __call__(
        self,
        texts: str | list[str],
        *,
        truncation: bool = False,
        max_length: int | None = None,
        **options: object,
    ) -> Ids:
        if isinstance(texts, str):
            return Ids(input_ids=[*map(ord, texts), 1])
        limit = (max_length or self.model_max_length) if truncation else None
        rows = [[*map(ord, text[: limit and limit - 1]), 1] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return Ids(input_ids=ids, attention_mask=(ids > 0).long())

    def decode(self, ids: torch.Tensor, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(i) for i in ids.tolist() if i > 1)


def test_texts_become_features_with_their_mask(recwarn) -> None:
    encoded = T5TextEncoder(Letters(), Encoder(), max_length=5)(["abcd", ""])
    assert encoded.keep.tolist() == [[True] * 5, [True, False, False, False, False]]
    assert encoded.features[0, :, 0].tolist() == [97, 98, 99, 100, 1]
    assert not recwarn  # it fits, with its end marker


@pytest.mark.parametrize(("max_length", "kept", "limit"), [(5, "a re", 5), (None, "a red c", 8)])
def test_long_texts_are_cut_where_the_warning_says(max_length: int | None, kept: str, limit: int) -> None:
    with pytest.warns(UserWarning) as caught:
        encoded = T5TextEncoder(Letters(), Encoder(), max_length)(["ab", "a red car", "a red car"])
    said = f"the prompt has 10 tokens and this model reads {limit}: it was cut after '{kept}'"
    assert [str(warning.message) for warning in caught] == [said, said]
    assert encoded.features[1, :, 0].tolist() == [*map(ord, kept), 1]
    assert encoded.keep.tolist()[0] == [True] * 3 + [False] * (limit - 3)


def test_texts_are_cleaned_first() -> None:
    encoded = T5TextEncoder(Letters(), Encoder(), clean=str.upper)(["ab"])
    assert encoded.features[0, :, 0].tolist() == [65, 66, 1]


def test_without_transformers_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[text\]'.*features"):
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


def test_left_padding_moves_what_counts_to_the_end() -> None:
    keep = torch.tensor([[True, True, False], [True, True, True]])
    right = TextFeatures(torch.arange(1.0, 7.0).reshape(2, 3, 1), keep)  # garbage, 3.0, in the padding
    left = right.left_padded(4)
    assert left.features[..., 0].tolist() == [[0, 0, 1, 2], [0, 4, 5, 6]]
    assert left.keep.tolist() == [[False, False, True, True], [False, True, True, True]]
    again = left.left_padded(4)
    assert torch.equal(again.features, left.features) and torch.equal(again.keep, left.keep)


def test_left_padding_cuts_padding_and_nothing_else() -> None:
    keep = torch.tensor([[True, True, False, False]])
    texts = TextFeatures(torch.arange(1.0, 5.0).reshape(1, 4, 1), keep)
    assert texts.left_padded(2).features[..., 0].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="a text has 2 tokens, this model reads at most 1; .* max_length=1"):
        texts.left_padded(1)
