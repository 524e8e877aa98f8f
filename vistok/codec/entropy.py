"""Token ids <-> bytes with a range coder (Martin 1979), `constriction`'s (Bamler 2022).

The coder is exact: its probabilities are multiples of 2^-24, and both directions compute in integers. It works in 32-bit
words; here the words become bytes, highest first, and all bytes are dropped that decoding does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

WORD = 4  # bytes of the coder's words
MAX_TOKEN_BYTES = 3  # a token of the smallest probability, 2^-24
STATE_BYTES = 8  # what the coder may write beyond the tokens' information


class Predictor(Protocol):
    """Predicts the tokens of one image, each from those before it."""

    def next(self, previous: int | None) -> Any:
        """The distribution (of `constriction`) of the next token; `previous` is the last one, `None` at the start."""
        ...


class UniformPredictor:
    """Every code is as likely as any other."""

    def __init__(self, codebook_size: int) -> None:
        self.distribution = constriction().stream.model.Uniform(codebook_size)

    def next(self, previous: int | None) -> Any:
        return self.distribution


class RecordedPredictor:
    """Predictions that were made before."""

    def __init__(self, distributions: Sequence[Any]) -> None:
        self.distributions = iter(distributions)

    def next(self, previous: int | None) -> Any:
        return next(self.distributions)


def encode_indices(indices: Sequence[int], predictor: Predictor) -> bytes:
    """The shortest bytes from which `decode_indices` restores `indices`."""
    distributions = [predictor.next(previous) for previous in (None, *indices[:-1])]
    encoder = constriction().stream.queue.RangeEncoder()
    for index, distribution in zip(indices, distributions, strict=True):
        encoder.encode(index, distribution)

    def restores(payload: bytes) -> bool:
        try:
            decoded = decode_indices(payload, len(indices), RecordedPredictor(distributions))
        except ValueError:
            return False
        return decoded == list(indices)

    return _shorten(encoder.get_compressed().astype(">u4").tobytes(), restores)


def decode_indices(payload: bytes, num_tokens: int, predictor: Predictor) -> list[int]:
    """The `num_tokens` ids that `encode_indices` was given, with a predictor of the same predictions.

    Raises:
        ValueError: the payload is longer than any of so many tokens, or was not made with such a predictor.
    """
    if len(payload) > MAX_TOKEN_BYTES * num_tokens + STATE_BYTES:
        raise ValueError(f"{len(payload)} bytes are too many for {num_tokens} tokens: no vistok wrote this")
    decoder = _decoder(payload, num_tokens)
    indices: list[int] = []
    for _ in range(num_tokens):
        distribution = predictor.next(indices[-1] if indices else None)
        try:
            indices.append(int(decoder.decode(distribution)))
        except AssertionError:  # of constriction, for data that no encoder makes
            raise ValueError("the tokens cannot be read: they were coded with other probabilities") from None
    return indices


def _shorten(payload: bytes, restores: Callable[[bytes], bool]) -> bytes:
    """The shortest byte string in the coder's final interval, which `payload` lies in; missing bytes count as 0.

    If any string of some length lies in the interval, then `payload` cut to that length does, or its successor.
    """
    while payload:
        size = len(payload) - 1
        cut = int.from_bytes(payload[:size])
        candidates = [number.to_bytes(size) for number in (cut, cut + 1) if number < 256**size]
        shorter = next(filter(restores, candidates), None)
        if shorter is None:
            break
        payload = shorter
    return payload


def _decoder(payload: bytes, num_tokens: int) -> Any:
    size = -(-(MAX_TOKEN_BYTES * num_tokens + STATE_BYTES) // WORD) * WORD
    words = np.frombuffer(payload.ljust(size, b"\0"), ">u4").astype(np.uint32)
    return constriction().stream.queue.RangeDecoder(words)


def constriction() -> ModuleType:
    """The package of that name.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        import constriction
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the codec needs constriction: pip install 'vistok[codec]'") from None
    return constriction
