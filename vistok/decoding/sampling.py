"""Drawing token ids from logits: temperature, top-k, top-p, typical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; for greedy decoding use top_k=1"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k must be at least 1, got {self.top_k}; the size of the codebook keeps all ids"
            )
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}; 1 keeps all ids")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when `top_k` is larger than the vocabulary."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(
                f"top_k {self.top_k} is larger than the vocabulary of {vocab_size}; {vocab_size} keeps all ids"
            )


def token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that `sample` draws from: `logits [... v]` -> probabilities `[... v]` float32.

    Raises:
        ValueError: `top_k` is larger than the vocabulary.
    """
    params.check_vocabulary(logits.shape[-1])
    logits = logits.float() / params.temperature
    if params.top_k is not None:
        smallest = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probs = logits.softmax(dim=-1)
    if params.top_p < 1:
        probs = _keep_mass(probs, rank=-probs, mass=params.top_p)
    if params.typical_p < 1:
        surprise = -probs.clamp_min(1e-30).log()
        entropy = (probs * surprise).sum(dim=-1, keepdim=True)
        probs = _keep_mass(probs, rank=(surprise - entropy).abs(), mass=params.typical_p)
    return probs


def _keep_mass(probs: Tensor, rank: Tensor, mass: float) -> Tensor:
    """Renormalised `probs` of the ids that come first by ascending `rank`, until their mass reaches `mass`."""
    order = rank.argsort(dim=-1, stable=True)
    ranked = probs.gather(-1, order)
    before = ranked.cumsum(dim=-1) - ranked  # mass of the ids ranked before each one
    kept = torch.zeros_like(probs).scatter(-1, order, ranked * (before < mass))
    return kept / kept.sum(dim=-1, keepdim=True)


def sample(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """Draw one id per distribution by inverting its cumulative distribution.

    Args:
        logits: `[... v]`.
        params: how to draw.
        uniforms: `[...]` in [0, 1), one draw per distribution.

    Returns:
        `[...]` int64.
    """
    return draw(token_probabilities(logits, params), uniforms)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """As `sample`, from probabilities `[... v]`, which need not sum to 1."""
    cumulative = probs.double().cumsum(dim=-1)  # [... v]
    target = uniforms.to(probs.device).double()[..., None] * cumulative[..., -1:]
    # side="right": an id without probability has an empty interval and is never drawn.
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp(max=probs.shape[-1] - 1)
