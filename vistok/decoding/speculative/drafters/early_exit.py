"""Self-speculation by early exit: the first blocks of the target draft for all of it (Liu et al. 2024, "Kangaroo:
Lossless Self-Speculative Decoding via Double Early Exiting").

Kangaroo exits twice: after some blocks, through an adapter, and from drafting, once the drafter is not sure of itself. Here
the drafter keeps keys of its own, where Kangaroo shares those of the first blocks with the target: the target
reads the drafted tokens through all of its blocks, and any engine and any draft length go with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vistok.decoding.speculative.draft_length import ConfidenceThreshold, DraftLength
from vistok.decoding.speculative.drafter import DraftStart, check_same_target
from vistok.decoding.speculative.drafters.independent import IndependentDrafter, IndependentSession
from vistok.decoding.speculative.tree import TreeShape
from vistok.models.drafters.early_exit import EarlyExitAdapter, with_early_exit


@dataclass(frozen=True)
class EarlyExitDrafter:
    """Drafts with the first blocks of the target.

    Args:
        adapter: trained for the target; on its device.
        tree: when to stop drafting a chain, or a fixed shape.
    """

    adapter: EarlyExitAdapter
    tree: TreeShape | DraftLength = field(default_factory=ConfidenceThreshold)

    def begin(self, start: DraftStart) -> IndependentSession:
        """Start with a batch.

        Raises:
            ValueError: the adapter was made for another target.
        """
        check_same_target(type(self.adapter).__name__, self.adapter.config["target"], start.target)
        model = with_early_exit(start.target, self.adapter)
        return IndependentDrafter(model, self.tree).begin(start)
