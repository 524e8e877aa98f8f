"""Losses of an EAGLE drafter (Li et al. 2024, "EAGLE"; Jang et al. 2024, "LANTERN"), and its unrolling over several
steps, in which it reads its own predictions as it does when it drafts (Zhang et al. 2024, "HASS"; Li et al. 2025,
"EAGLE-3").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention import AttentionMask
from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache


@dataclass(frozen=True)
class Pairs:
    """What a drafter reads and should predict, for r rows of m positions.

    Args:
        features: `[r m d]`.
        tokens: `[r m]` int64, drawn after them.
        targets: `[r m d]`, the features that follow.
        first: the first position whose prediction counts.
    """

    features: Tensor
    tokens: Tensor
    targets: Tensor
    first: int

    def is_supervised(self, step: int = 0) -> Tensor:
        """`[m]`: where a prediction counts that was drafted `step` steps after the last true feature."""
        return torch.arange(self.features.shape[1], device=self.features.device) >= self.first + step


def align(features: Tensor, indices: Tensor, prefix_length: int, *, supervise_first: bool = True) -> Pairs:
    """Pairs from what the target read.

    Args:
        features: `[r l d]`, of `prefix_length + 1` condition positions and of the first `l - prefix_length - 1` tokens.
        indices: `[r n]` int64, at least so many tokens.
        prefix_length: of the drafter; its tokens are 0.
        supervise_first: whether the prediction at the first token counts, which the release leaves out.
    """
    count = features.shape[1] - 1
    tokens = F.pad(indices[:, : count - prefix_length], (prefix_length, 0))
    first = prefix_length if supervise_first else prefix_length + 1
    return Pairs(features[:, :-1], tokens, features[:, 1:], first)


def masked_mean(values: Tensor, is_supervised: Tensor) -> Tensor:
    """The mean of `[r m]` over the positions that count, `[m]`."""
    return values[:, is_supervised].mean()


def feature_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 between features, `[r m d]` -> `[r m]`."""
    return F.smooth_l1_loss(predicted, targets, reduction="none").mean(dim=-1)


def token_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy between the laws of two sets of logits, `[r m v]` -> `[r m]`."""
    return -(targets.softmax(dim=-1) * predicted.log_softmax(dim=-1)).sum(dim=-1)


def law_loss(logits: Tensor, law_tokens: Tensor, law_probs: Tensor) -> Tensor:
    """Cross-entropy with laws of few tokens: logits `[b m v]`, laws `[b m k]` -> `[b m]`."""
    log_probs = logits.gather(-1, law_tokens) - logits.logsumexp(dim=-1, keepdim=True)
    return -(law_probs * log_probs).sum(dim=-1)


def unrolled(network: EagleDrafter, pairs: Pairs, token_embeds: Tensor, num_steps: int) -> Iterator[Tensor]:
    """The drafter's predictions `[r m d]` from true features, from those predictions, and so on `num_steps` times.

    At step t position j reads what step t - 1 predicted for it, and sees true features up to j - t and then those of
    one step after the other, as at the end of a chain of t drafted tokens. The first positions have no such past;
    `Pairs.is_supervised` leaves them out.
    """
    positions = torch.arange(pairs.features.shape[1], device=pairs.features.device)
    cache = StepsCache(len(network.blocks))
    features = pairs.features
    for step in range(num_steps):
        predicted = network(features, token_embeds, positions, StepsMask(step), cache)
        yield predicted
        features = torch.cat([features[:, :1], predicted[:, :-1]], dim=1)


@dataclass(frozen=True)
class StepsMask(AttentionMask):
    """The queries are m positions at a `step`, the keys the same m positions at steps 0 to `step`."""

    step: int

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return self.once("dense", device, lambda: self._dense(num_queries, device))

    def _dense(self, num_positions: int, device: torch.device) -> Tensor:
        places = torch.arange(num_positions, device=device)
        ahead = places - places[:, None] + self.step  # [q k]: how far a key lies behind the last true feature
        later = [ahead == step for step in range(1, self.step + 1)]
        return torch.cat([ahead <= 0, *later], dim=1)[None, None]


class StepsCache(KVCache):
    """Keys and values of all steps, through which gradients flow."""

    def __init__(self, depth: int) -> None:
        self.layers = [StepsLayer() for _ in range(depth)]


class StepsLayer(LayerCache):
    """Those of one layer."""

    def __init__(self) -> None:
        self.rows = None  # they advance together
        self.kept: list[tuple[Tensor, Tensor]] = []

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.kept.append((keys, values))
        all_keys, all_values = zip(*self.kept, strict=True)
        return torch.cat(all_keys, dim=2), torch.cat(all_values, dim=2)
