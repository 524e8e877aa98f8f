"""The definition: classifier-free guidance, filters, and the draw of a token id from what they leave."""

from __future__ import annotations

import torch
from torch import Tensor


def check_filters(
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, typical_p: float = 1.0
) -> None:
    """Raises ValueError where a setting is outside its range; see `filtered_probabilities`."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature}; for greedy decoding use top_k=1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; the size of the codebook keeps all ids")
    for name, mass in (("top_p", top_p), ("typical_p", typical_p)):
        if not 0 < mass <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {mass}; 1 keeps all ids")


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    """Raises ValueError when `top_k` is larger than the vocabulary."""
    if top_k is not None and top_k > vocab_size:
        raise ValueError(
            f"top_k {top_k} is larger than the vocabulary of {vocab_size}; {vocab_size} keeps all ids"
        )


def apply_guidance(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Move predictions away from the unconditional ones; both of one shape. A scale of 1.0 gives back `cond`.

    A tensor of scales has the shape of the predictions but for axes of 1.
    """
    if isinstance(guidance_scale, Tensor):
        return torch.where(guidance_scale == 1.0, cond, uncond + guidance_scale * (cond - uncond))
    if guidance_scale == 1.0:
        return cond
    return (cond - uncond).mul_(guidance_scale).add_(uncond)


def filtered_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    typical_p: float = 1.0,
) -> Tensor:
    """The distribution that tokens are drawn from: `logits [... v]` -> probabilities `[... v]` float32.

    Args:
        logits: `[... v]`.
        temperature: divides the logits; above 0.
        top_k: keep the k most probable ids, and all that are as probable as the last of them; `None` keeps all.
        top_p: keep the smallest set of most probable ids with at least this mass, of equally probable ones those of
            lower id (Holtzman et al. 2020); in (0, 1].
        typical_p: keep the ids whose surprise is nearest the entropy, up to this mass (Meister et al. 2023, section
            3); in (0, 1].

    Raises:
        ValueError: `top_k` is larger than the vocabulary.
    """
    check_top_k(top_k, logits.shape[-1])
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        probs = _keep_mass(probs, rank=-probs, mass=top_p)
    if typical_p < 1:
        surprise = -probs.clamp_min(1e-30).log()
        entropy = (probs * surprise).sum(dim=-1, keepdim=True)
        probs = _keep_mass(probs, rank=(surprise - entropy).abs(), mass=typical_p)
    return probs


def _keep_mass(probs: Tensor, rank: Tensor, mass: float) -> Tensor:
    """Renormalised `probs` of the ids that come first by ascending `rank`, until their mass reaches `mass`."""
    order = rank.argsort(dim=-1, stable=True)
    ranked = probs.gather(-1, order)
    before = ranked.cumsum(dim=-1, dtype=torch.float64) - ranked  # mass of the ids ranked before each one
    kept = torch.zeros_like(probs).scatter(-1, order, ranked * (before < mass))
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one id per distribution by inverting its cumulative distribution.

    Args:
        probs: `[... v]`, which need not sum to 1.
        uniforms: `[...]` in [0, 1), one draw per distribution.

    Returns:
        `[...]` int64; -1 where there is no distribution: a NaN, or nothing above 0.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # [... v]
    total = cumulative[..., -1:]
    target = uniforms.to(probs.device, non_blocking=True).double()[..., None] * total
    # right=True: an id without probability has an empty interval and is never drawn.
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[-1] - 1)
    return torch.where(total > 0, drawn, -1)[..., 0]


def reference_sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    typical_p: float,
    guidance_scale: float | Tensor,
) -> Tensor:
    """See `sample_tokens`."""
    logits = logits.float()
    if len(logits) == 2 * len(uniforms):
        cond, uncond = logits.chunk(2)
        logits = apply_guidance(cond, uncond, guidance_scale)
    probs = filtered_probabilities(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, typical_p=typical_p
    )
    return draw(probs, uniforms)
