"""Whether images show what they should: the label of the nearest real image in feature space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A share of images; `None` of none."""

    share: float | None
    num_images: int

    def __str__(self) -> str:
        return "–" if self.share is None else f"{100 * self.share:.1f} % of {self.num_images}"


def nearest(features: Tensor, bank: Tensor) -> Tensor:
    """Index of the most similar row of `bank [m d]` by cosine, for every row of `features [n d]`: `[n]` int64."""
    return (F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T).argmax(dim=1)


def share_of(hits: Sequence[bool]) -> Share:
    """How many are true."""
    return Share(share=sum(hits) / len(hits) if hits else None, num_images=len(hits))


def chance_level(wanted: Sequence[str], bank_labels: Sequence[str]) -> float:
    """Expected share of hits when every neighbour is drawn from the bank at random."""
    counts = Counter(bank_labels)
    return sum(counts[label] for label in wanted) / (len(bank_labels) * len(wanted))
