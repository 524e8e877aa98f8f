"""Drawing token ids from logits: temperature, top-k, top-p, typical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vistok.kernels.sampling import check_filters, check_top_k, filtered_probabilities
from vistok.kernels.sampling import draw as draw  # belongs to this module's names

LogitsProcessor = Callable[
    [Tensor], Tensor
]  # guided float32 logits [b k v] -> the same shape, before sampling


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. The default is the model's own distribution; `top_k=1` is greedy.

    Args:
        temperature: divides the logits; above 0.
        top_k: keep the k most probable ids; `None` keeps all.
        top_p: keep the smallest set of most probable ids with at least this mass (Holtzman et al. 2020); in (0, 1].
        typical_p: keep the ids whose surprise is nearest the entropy, up to this mass (Meister et al. 2023, section
            3); in (0, 1].

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        check_filters(self.temperature, self.top_k, self.top_p, self.typical_p)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when `top_k` is larger than the vocabulary."""
        check_top_k(self.top_k, vocab_size)


def token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that `sample` draws from: `logits [... v]` -> probabilities `[... v]` float32.

    Raises:
        ValueError: `top_k` is larger than the vocabulary.
    """
    return filtered_probabilities(
        logits,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        typical_p=params.typical_p,
    )


def sample(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """Draw one id per distribution by inverting its cumulative distribution.

    Args:
        logits: `[... v]`.
        params: how to draw.
        uniforms: `[...]` in [0, 1), one draw per distribution.

    Returns:
        `[...]` int64; -1 where the logits are no distribution: a NaN, +inf, or none of them finite.
    """
    return draw(token_probabilities(logits, params), uniforms)
