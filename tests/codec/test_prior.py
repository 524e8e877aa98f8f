from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec.conftest import make_generator
from vistok.codec.entropy import decode_indices, encode_indices
from vistok.codec.prior import TOTAL, GeneratorPredictor, integer_counts, reproducible


@given(st.lists(st.floats(-1e4, 1e4) | st.just(-np.inf), min_size=2, max_size=50))
def test_counts_are_the_probabilities(values: list[float]) -> None:
    logits = torch.tensor([*values, 0.0], dtype=torch.float64)
    counts = integer_counts(logits)
    assert counts.dtype == np.int64 and counts.min() >= 0
    assert counts.sum() + len(logits) == TOTAL
    # Half a step of 1/32 nat is 1.6 %, in the numerator and in the sum; small counts are rounded down.
    expected = torch.softmax(logits, 0).numpy() * TOTAL
    assert np.all(np.abs(counts - expected) <= 0.033 * expected + 1 + len(logits))


def test_small_differences_between_machines_do_not_matter() -> None:
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    assert np.array_equal(integer_counts(logits), integer_counts(logits + 1e-13 * logits.flip(0)))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_predictions_that_are_no_numbers(wrong: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        integer_counts(torch.tensor([0.0, wrong, 1.0]))


@settings(max_examples=8)
@given(st.sampled_from([2, 20, 300]), st.data())
def test_a_generator_restores_any_tokens(codebook_size: int, data: st.DataObject) -> None:
    model = reproducible(make_generator(codebook_size=codebook_size, num_tokens=9))
    indices = data.draw(st.lists(st.integers(0, codebook_size - 1), min_size=1, max_size=9))
    payload = encode_indices(indices, GeneratorPredictor(model))
    assert decode_indices(payload, len(indices), GeneratorPredictor(model)) == indices


def test_likely_tokens_take_fewer_bytes_than_unlikely_ones() -> None:
    model = reproducible(make_generator(codebook_size=300, num_tokens=9))
    chosen: dict[str, list[int]] = {"likely": [], "unlikely": []}
    for name, choose in (("likely", torch.argmax), ("unlikely", torch.argmin)):
        cache = model.new_cache(1)
        with torch.no_grad():
            logits = model.prefill(model.null_condition(1), cache)
            chosen[name].append(int(choose(logits[0, -1])))
            while len(chosen[name]) < 9:
                logits = model.step(torch.tensor([chosen[name][-1:]]), cache)
                chosen[name].append(int(choose(logits[0, -1])))
    likely, unlikely = (len(encode_indices(chosen[name], GeneratorPredictor(model))) for name in chosen)
    assert likely < 9 * np.log2(300) / 8 < unlikely


def test_the_number_of_threads_changes_nothing_and_is_restored() -> None:
    model = reproducible(make_generator())
    before = torch.get_num_threads()
    try:
        payloads = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            payloads.append(encode_indices([3, 1, 4, 1, 5, 9], GeneratorPredictor(model)))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert payloads[0] == payloads[1]


def test_the_generator_itself_is_left_alone() -> None:
    generator = make_generator().train()
    model = reproducible(generator)
    assert generator.training and generator.dtype == torch.float32
    assert not model.training and model.dtype == torch.float64
