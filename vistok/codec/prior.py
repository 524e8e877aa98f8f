"""A next-token generator as entropy model: likely images take fewer bytes.

Encoder and decoder must agree on every probability to the last bit, so both compute the same way: one image, token by
token with a cache, on the CPU, one thread, in float64. Log-probabilities are rounded to a grid much coarser than
float64's error and much finer than what costs bytes, and become integers before they are normalised. What is left to
chance between machines, the checksum of the tokens in the file finds.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.codec.entropy import constriction
from vistok.models.generators.base import OrderedGenerator

TOTAL = 2**24  # the range coder's probabilities are multiples of 1 / TOTAL
STEPS_PER_NAT = 32  # grid of log-probabilities: rounding to it costs about 1e-4 bits per token
WEIGHT_SCALE = 2**32


class GeneratorPredictor:
    """Predictions for the tokens of one image by an unconditional generator; see `entropy.Predictor`.

    Args:
        model: as `reproducible` returns it.
    """

    def __init__(self, model: OrderedGenerator) -> None:
        self.model = model
        self.cache = model.new_cache(1)

    @torch.inference_mode()
    def next(self, previous: int | None) -> Any:
        with _one_thread():
            if previous is None:
                logits = self.model.prefill(self.model.null_condition(1), self.cache)
            else:
                logits = self.model.step(torch.tensor([[previous]]), self.cache)
            counts = integer_counts(logits[0, -1])
        # constriction adds 1 to every count; as they then sum to TOTAL, it scales nothing and stays exact.
        return constriction().stream.model.Categorical(counts.astype(np.float64), perfect=False)


def reproducible(model: OrderedGenerator) -> OrderedGenerator:
    """A copy of `model` on the CPU in float64, in evaluation mode."""
    return copy.deepcopy(model).cpu().double().eval()


def integer_counts(logits: Tensor) -> np.ndarray:
    """Logits `[v]` -> int64 counts `[v]` proportional to the probabilities, which sum to TOTAL - v.

    Raises:
        ValueError: a logit is not a number, or all are infinite.
    """
    logits = logits.double()
    if not torch.isfinite(logits.max()):
        raise ValueError("the generator's predictions are not finite numbers; its weights are damaged")
    steps = ((logits.max() - logits) * STEPS_PER_NAT).round()  # [v] whole numbers from 0
    weights = (torch.exp(-steps / STEPS_PER_NAT) * WEIGHT_SCALE).round().to(torch.int64).numpy()
    total = TOTAL - len(weights)
    counts = weights * total // weights.sum()
    counts[weights.argmax()] += total - counts.sum()
    return counts


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over several threads may be added up in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
