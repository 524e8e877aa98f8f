"""A watermark by lexical bias: a secret set of codes is drawn a little more often, and counting them gives it away.

Green lists of codes (Kirchenbauer et al. 2023, "A Watermark for Large Language Models", section 3) with a pool of fixed
lists for image tokens (Hui et al. 2025, "Autoregressive Images Watermarking through Lexical Biasing"): a key gives M
lists of K of the V codes, an image uses one of them, and while it is drawn the logits of that list's codes are raised.

Detection tests "these tokens have nothing to do with the key". Under it the tokens are fixed and the *list* is random,
all subsets of K codes being equally likely, and the count of green tokens is

    S = sum_c n_c g_c,      n_c: how often code c occurs in the image, g_c = 1 if c is green, else 0

with n = sum_c n_c and, the list being drawn without replacement,

    E[S] = n K / V,         Var[S] = K (V - K) / (V (V - 1)) * (sum_c n_c^2 - n^2 / V).

A code that occurs five times is one draw of weight five: the binomial n g (1 - g) of independent tokens would be too
small and raise false alarms. Nor is S normal for the few dozen tokens of an image, so the p-value is the exact tail
P(S >= s). The best of the M lists counts, which are independent, hence `1 - (1 - p)^M` (Sidak 1967).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vistok.tokens import Tokens

NUM_LISTS = 4
GREEN_FRACTION = 0.5
STRENGTH = 2.0


@dataclass(frozen=True)
class WatermarkKey:
    """What whoever marks images and whoever looks for marks share.

    Args:
        text: the secret, any text.
        codebook_size: of the tokenizer, V.
        num_lists: lists in the pool, M. With more of them a list is harder to guess from many images, and a mark harder
            to detect.
        green_fraction: the share of the codes on a list, in (0, 1).

    Raises:
        ValueError: an empty text, no lists, or a list without any code or with every code.
    """

    text: str
    codebook_size: int
    num_lists: int = NUM_LISTS
    green_fraction: float = GREEN_FRACTION

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("the watermark's key is empty; choose a text that nobody guesses")
        if self.num_lists < 1:
            raise ValueError(f"num_lists must be at least 1, got {self.num_lists}")
        if not (0 < self.green_fraction < 1 and 0 < self.num_green < self.codebook_size):
            raise ValueError(
                f"green_fraction must leave codes both on and off a list of {self.codebook_size}, "
                f"got {self.green_fraction}"
            )

    @property
    def num_green(self) -> int:
        """Codes on each list, K."""
        return round(self.green_fraction * self.codebook_size)

    def green_lists(self) -> Tensor:
        """`[m v]` boolean: `True` where a code is on a list; the same in every process and on every machine."""
        return _green_lists(self)

    def list_of(self, seed: int) -> int:
        """The number of the list that the image drawn with `seed` uses."""
        return int.from_bytes(_keyed_bytes(self.text, f"seed {seed}", 16), "little") % self.num_lists


class Watermark:
    """A `LogitsProcessor` that raises the logits of each image's green codes.

    Args:
        key: the shared secret.
        list_numbers: the list of each image of the batch, in `[0, num_lists)`.
        strength: what is added to the logits of green codes; 0 marks nothing.

    Raises:
        ValueError: a list that the key does not have, or a negative or infinite strength.
    """

    def __init__(self, key: WatermarkKey, list_numbers: Sequence[int], strength: float = STRENGTH) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"the watermark's strength must be at least 0, got {strength}; 0 marks nothing")
        if not all(0 <= number < key.num_lists for number in list_numbers):
            raise ValueError(f"the key has lists 0 to {key.num_lists - 1}, got {list(list_numbers)}")
        self.strength = strength
        self.bias = strength * key.green_lists()[list(list_numbers)][:, None].float()  # [b 1 v]

    @classmethod
    def for_seeds(cls, key: WatermarkKey, seeds: Sequence[int], strength: float = STRENGTH) -> Watermark:
        """The watermark of a batch with one seed per image."""
        return cls(key, [key.list_of(seed) for seed in seeds], strength)

    def rows(self, part: slice) -> Watermark:
        """The watermark of some of the images."""
        some = copy.copy(self)
        some.bias = self.bias[part]
        return some

    def __call__(self, logits: Tensor) -> Tensor:
        """Guided logits `[b k v]` -> the same shape.

        Raises:
            ValueError: another number of images or of codes than the watermark is made for.
        """
        batch_size, _, codebook_size = self.bias.shape
        if (len(logits), logits.shape[-1]) != (batch_size, codebook_size):
            raise ValueError(
                f"this watermark is made for {batch_size} images and {codebook_size} codes, "
                f"the logits are {list(logits.shape)}"
            )
        self.bias = self.bias.to(logits.device)  # moves once
        return logits + self.bias


@dataclass(frozen=True)
class Detection:
    """What the tokens of one image say about a key; see the module for the formulas."""

    z_score: float  # of the best list
    p_value: float  # chance that an unmarked image looks as marked as this one, all lists considered
    list_number: int  # the best list

    def is_marked(self, false_positive_rate: float) -> bool:
        """The decision that is wrong for at most this share of keys, when the image is not marked."""
        return self.p_value <= false_positive_rate


def detect(tokens: Tokens, key: WatermarkKey) -> list[Detection]:
    """Look for a watermark in every image; padding does not count.

    The false-positive rate is over keys. Images of one kind share many codes, so that for one key they are wrongly
    found together or not at all.

    Raises:
        ValueError: continuous tokens, or another codebook size than the key's.
    """
    if tokens.indices is None:
        raise ValueError("a watermark is in the choice of codes; continuous tokens carry none")
    if tokens.codebook_size != key.codebook_size:
        raise ValueError(
            f"the key is for {key.codebook_size} codes, these tokens point into {tokens.codebook_size}"
        )
    rows = zip(tokens.indices.cpu(), tokens.token_counts.tolist(), strict=True)
    return [_detect_one(row[:length], key) for row, length in rows]


def _detect_one(indices: Tensor, key: WatermarkKey) -> Detection:
    codes, counts = indices.unique(return_counts=True)
    sums = (key.green_lists()[:, codes] * counts).sum(dim=1)  # [m]
    best = int(sums.argmax())  # all lists are of one size, so the largest sum is the least likely one
    mean, variance = green_moments(counts, key.codebook_size, key.num_green)
    tail = green_tail(tuple(sorted(counts.tolist())), key.codebook_size, key.num_green)
    p_value = float(tail[sums[best]])
    return Detection(
        z_score=(int(sums[best]) - mean) / math.sqrt(variance) if variance else 0.0,
        p_value=-math.expm1(key.num_lists * math.log1p(-p_value)) if p_value < 1 else 1.0,
        list_number=best,
    )


def green_moments(counts: Tensor, codebook_size: int, num_green: int) -> tuple[float, float]:
    """Mean and variance of the count of green tokens over random lists, given how often each code occurs `[d]`."""
    total, squares = int(counts.sum()), int((counts**2).sum())
    share = num_green / codebook_size
    spread = squares - total**2 / codebook_size
    return total * share, share * (codebook_size - num_green) / (codebook_size - 1) * spread


@lru_cache(maxsize=1024)
def green_tail(counts: tuple[int, ...], codebook_size: int, num_green: int) -> Tensor:
    """The probability that at least s tokens are green under a random list, `[n + 1]` float64 for s = 0 .. n.

    Exact: the repeated codes are drawn one after the other, and with j of the first i green, the next one is with
    probability `(K - j) / (V - i)`; of the codes that occur once, a hypergeometric number is green.

    Args:
        counts: how often each code occurs, n tokens in all.
        codebook_size, num_green: V and K.
    """
    repeated, num_single = [count for count in counts if count > 1], counts.count(1)
    of_repeated = _repeated_green(repeated, codebook_size, num_green)  # [r+1 t+1]
    left = num_green - torch.arange(len(repeated) + 1)[:, None]  # [r+1 1], green codes among the others
    of_single = _hypergeometric(num_single, codebook_size - len(repeated), left)  # [r+1 num_single+1]
    probability = torch.zeros(sum(counts) + 1, dtype=torch.float64)
    for total, reached in enumerate(of_repeated.T):
        probability[total : total + num_single + 1] += reached @ of_single
    return probability.flip(0).cumsum(dim=0).flip(0).clamp(max=1)


def _repeated_green(counts: list[int], codebook_size: int, num_green: int) -> Tensor:
    """How many of these codes are green, and how many tokens: their joint distribution, `[codes + 1, tokens + 1]`."""
    probability = torch.zeros(len(counts) + 1, sum(counts) + 1, dtype=torch.float64)
    probability[0, 0] = 1
    num_greens, total = torch.arange(len(counts) + 1, dtype=torch.float64)[:, None], 0
    for i, count in enumerate(counts):
        reached = probability[: i + 1, : total + 1]
        moved = reached * ((num_green - num_greens[: i + 1]) / (codebook_size - i)).clamp(0, 1)
        reached -= moved
        probability[1 : i + 2, count : total + count + 1] += moved
        total += count
    return probability


def _hypergeometric(num_drawn: int, codebook_size: int, num_green: Tensor) -> Tensor:
    """The chance of each number of green codes among `num_drawn` different ones, `[r 1]` -> `[r num_drawn + 1]`."""
    drawn = torch.arange(num_drawn + 1)
    num_red = codebook_size - num_green
    is_possible = (drawn <= num_green) & (num_drawn - drawn <= num_red) & (num_green >= 0) & (num_red >= 0)
    ways = _log_choose(num_green, drawn) + _log_choose(num_red, num_drawn - drawn)
    chance = (ways - _log_choose(torch.tensor(codebook_size), torch.tensor(num_drawn))).exp()
    return chance.where(is_possible, 0.0)


def _log_choose(total: Tensor, chosen: Tensor) -> Tensor:
    """The logarithm of the binomial coefficient; without meaning where there is none."""
    total, chosen = total.double(), chosen.double()
    return torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(total - chosen + 1)


@lru_cache(maxsize=8)
def _green_lists(key: WatermarkKey) -> Tensor:
    lists = torch.zeros(key.num_lists, key.codebook_size, dtype=torch.bool)
    for number, row in enumerate(lists):
        ranks = np.frombuffer(_keyed_bytes(key.text, f"list {number}", 8 * key.codebook_size), dtype="<u8")
        row[torch.from_numpy(ranks.argsort(kind="stable")[: key.num_green])] = True
    return lists


def _keyed_bytes(text: str, purpose: str, size: int) -> bytes:
    """Bytes that look random to whoever does not know the key's text; independent for different purposes."""
    return hashlib.shake_256(f"vistok watermark/{purpose}/{text}".encode()).digest(size)
