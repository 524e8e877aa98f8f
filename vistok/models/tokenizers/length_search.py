"""Choosing how many tokens an image needs: the shortest prefix whose picture is good enough.

Prefixes are decoded and measured, all images of a batch together and each at its own length, and the length is found by
bisection: `ceil(log2(n + 1))` decodes for up to `n` tokens. A decoder's curve of quality against length rises on the
whole but not at every step, so this is what is promised, for any curve:

- the chosen prefix was measured and meets the target, if any measured prefix did; no shorter measured prefix does;
- the prefix one token shorter was measured and misses the target (unless one token is enough);
- if all prefixes from some length on meet the target and none before it does, that length is chosen: the same as
  measuring every prefix;
- a stricter target never gives a shorter prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DATA_RANGE = 255

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Reconstructions and originals, both `[b 3 H W]` in [-1, 1] -> distance of each pair, `[b]`; 0 if they look alike."""


@dataclass(frozen=True)
class LengthChoice:
    """Lengths that a search chose.

    Attributes:
        lengths: `[b]` int64. Where no measured prefix meets the target, all tokens.
        is_met: `[b]` boolean, whether the chosen prefix meets the target.
    """

    lengths: Tensor
    is_met: Tensor


def shortest_prefixes(meets: Callable[[Tensor], Tensor], num_images: int, max_tokens: int) -> LengthChoice:
    """The shortest prefix of each image that meets a target, by bisection; the module says what is promised.

    Args:
        meets: lengths `[b]` int64 in `1..max_tokens` -> whether these prefixes meet the target, `[b]` boolean.
        num_images: `b`.
        max_tokens: the longest prefix to try.
    """
    longest_miss = torch.zeros(num_images, dtype=torch.int64)
    shortest_hit = torch.full((num_images,), max_tokens + 1)  # one more than there are: nothing was found yet
    while bool((is_open := shortest_hit - longest_miss > 1).any()):
        # an image that is done measures its result once more; all images finish within one round of each other
        middle = torch.where(is_open, (longest_miss + shortest_hit) // 2, shortest_hit.clamp(max=max_tokens))
        is_hit = meets(middle).cpu()
        shortest_hit = torch.where(is_open & is_hit, middle, shortest_hit)
        longest_miss = torch.where(is_open & ~is_hit, middle, longest_miss)
    return LengthChoice(shortest_hit.clamp(max=max_tokens), shortest_hit <= max_tokens)


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures as they would be saved, `[b]` float64; infinite if equal.

    Both are `[b 3 H W]` in [-1, 1] and are rounded to 8 bits first, so that a target holds for the saved file.
    """
    error = _to_8_bits(reconstructions) - _to_8_bits(images.to(reconstructions.device))
    return 10 * torch.log10(DATA_RANGE**2 / error.square().mean(dim=(1, 2, 3)))


def _to_8_bits(images: Tensor) -> Tensor:
    return ((images.double() + 1) * (DATA_RANGE / 2)).round().clamp(0, DATA_RANGE)
