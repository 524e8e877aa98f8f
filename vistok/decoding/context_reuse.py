"""Which evaluations of a masked generator may reuse what an earlier one found out about the context.

After "Plug-and-Play Context Feature Reuse for Efficient Masked Generation" (Liu et al. 2025, ReCAP): what a
decided token contributes to the attention of the others hardly changes while few tokens are added, so full
evaluations alternate with cheap ones that keep the keys and values of the last full one. `mar_sampling` and
`masked` say which.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class ContextReuse:
    """A schedule of full and cheap evaluations.

    Args:
        period: one evaluation in so many is full; 1 is off.
        warm_up: so many of the first evaluations are full, and the one after them; there is little context yet, and it
            changes most.

    Raises:
        ValueError: `period` below 1, or `warm_up` below 0.
    """

    period: int = 2
    warm_up: int = 0

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(
                f"period counts evaluations and must be at least 1, which is off; got {self.period}"
            )
        if self.warm_up < 0:
            raise ValueError(f"warm_up counts evaluations and must be at least 0, got {self.warm_up}")

    def is_full(self, step: int) -> bool:
        """Whether the evaluation at `step`, counted from 0, is full; the first always is."""
        return step < self.warm_up or (step - self.warm_up) % self.period == 0

    def next_full(self, step: int) -> int:
        """The first step after `step` at which the evaluation is full."""
        return next(later for later in count(step + 1) if self.is_full(later))
