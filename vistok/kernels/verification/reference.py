"""The definition of strict verification (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.sampling import draw


def reference_verify_chain(
    tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    uniforms: Tensor,
    num_drafted: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `verify_chain`; there is at least one token."""
    count = tokens.shape[1]
    index, steps = tokens[..., None], torch.arange(count, device=tokens.device)
    chances = target_probs[:, :count].gather(2, index)[..., 0]  # [b t]
    is_possible = torch.ones_like(tokens, dtype=torch.bool)
    if draft_probs is not None:
        likelihoods = draft_probs[:, :count].gather(2, index)[..., 0]
        is_possible = likelihoods > 0
        chances = torch.where(is_possible, chances / torch.where(is_possible, likelihoods, 1.0), 0.0)
    is_accepted = (uniforms[:, :count] < chances) & (steps < num_drafted[:, None])
    num_accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)  # [b]
    rejected = num_accepted.clamp_max(count - 1)[:, None]  # [b 1], if any was
    has_rejected = (num_accepted < num_drafted)[:, None] & is_possible.gather(1, rejected)
    target = _at(target_probs, num_accepted)
    if draft_probs is None:
        rest = target.scatter(1, tokens.gather(1, rejected), 0.0)
    else:
        rest = (target - _at(draft_probs, rejected[:, 0])).clamp_min(0)
    mass = rest.sum(dim=1, keepdim=True)
    # Without mass, the token was rejected by rounding alone.
    law = torch.where(has_rejected & (mass > 0), rest / torch.where(mass > 0, mass, 1.0), target)
    return num_accepted, draw(law, uniforms[:, count])


def _at(probs: Tensor, step: Tensor) -> Tensor:
    """`probs [b t v]` at one step per row `[b]` -> `[b v]`."""
    return probs.gather(1, step[:, None, None].expand(-1, 1, probs.shape[2]))[:, 0]
