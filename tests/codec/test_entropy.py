from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.codec.entropy import UniformPredictor, constriction, decode_indices, encode_indices

CODEBOOK_SIZES = [2, 3, 20, 255, 256, 4096, 64000, 2**18, 2**24 - 1]


class TablePredictor:
    """Fixed counts per position; checks that it is told the token before."""

    def __init__(self, tables: list[list[int]], indices: list[int]) -> None:
        self.tables = iter(tables)
        self.previous = iter([None, *indices])

    def next(self, previous: int | None) -> object:
        assert previous == next(self.previous)
        counts = np.array(next(self.tables), dtype=np.float64)
        return constriction().stream.model.Categorical(counts, perfect=False)


@st.composite
def uniform_messages(draw: st.DrawFn) -> tuple[int, list[int]]:
    codebook_size = draw(st.sampled_from(CODEBOOK_SIZES))
    return codebook_size, draw(st.lists(st.integers(0, codebook_size - 1), min_size=1, max_size=100))


@given(uniform_messages())
def test_a_uniform_model_restores_any_tokens_in_as_few_bytes_as_there_are(
    message: tuple[int, list[int]],
) -> None:
    codebook_size, indices = message
    payload = encode_indices(indices, UniformPredictor(codebook_size))
    assert decode_indices(payload, len(indices), UniformPredictor(codebook_size)) == indices
    # Codes other than the last have probability floor(2^24 / size) / 2^24; the coder's rounding costs next to nothing.
    bits = -len(indices) * math.log2((2**24 // codebook_size) / 2**24)
    assert len(payload) <= math.ceil(bits / 8 + 1e-3)
    assert not payload.endswith(b"\0")


@pytest.mark.parametrize("codebook_size", CODEBOOK_SIZES)
@pytest.mark.parametrize("which", ["first", "last"])
def test_the_ends_of_the_codebook(codebook_size: int, which: str) -> None:
    indices = [0 if which == "first" else codebook_size - 1] * 40
    payload = encode_indices(indices, UniformPredictor(codebook_size))
    assert decode_indices(payload, 40, UniformPredictor(codebook_size)) == indices


@st.composite
def table_messages(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    codebook_size = draw(st.integers(2, 12))
    counts = st.lists(st.integers(0, 2**20), min_size=codebook_size, max_size=codebook_size)
    tables = draw(st.lists(counts, min_size=1, max_size=30))
    for table in tables:
        table[0] += 2**24 - codebook_size - sum(table)
    return tables, [draw(st.integers(0, codebook_size - 1)) for _ in tables]


@given(table_messages())
def test_changing_distributions(message: tuple[list[list[int]], list[int]]) -> None:
    tables, indices = message
    payload = encode_indices(indices, TablePredictor(tables, indices))
    assert decode_indices(payload, len(indices), TablePredictor(tables, indices)) == indices
    bits = sum(-math.log2((table[i] + 1) / 2**24) for table, i in zip(tables, indices, strict=True))
    assert len(payload) <= math.ceil(bits / 8 + 1e-3)


def test_certain_tokens_cost_nothing() -> None:
    tables = [[2**24 - 3, 0, 0]] * 64
    assert encode_indices([0] * 64, TablePredictor(tables, [0] * 64)) == b""


@given(st.binary(max_size=40), st.integers(1, 20))
def test_any_bytes_become_tokens_or_an_error(payload: bytes, num_tokens: int) -> None:
    try:
        indices = decode_indices(payload, num_tokens, UniformPredictor(20))
    except ValueError:
        return
    assert len(indices) == num_tokens and 0 <= min(indices) <= max(indices) < 20


def test_a_payload_that_no_tokens_fill() -> None:
    with pytest.raises(ValueError, match="100 bytes are too many for 3 tokens"):
        decode_indices(bytes(100), 3, UniformPredictor(20))


def test_without_constriction(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[codec\]'"):
        UniformPredictor(20)
