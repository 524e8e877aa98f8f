"""Speculative Jacobi decoding: the target drafts for itself, with what it thought of the same positions one pass ago
(Teng et al. 2024, "Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding").

A window of drafted tokens follows the root. One pass of the target verifies them, and at the same time says what would
follow each of them; from these distributions the tokens behind the first rejected one are drafted anew. What a token was
drawn from is kept as its draft distribution, so that it is accepted with probability `min(1, p/q)` and the images are
those of plain decoding.

Drawn independently, a token changes at every pass even where its distribution does not, and with it the distributions
of all tokens behind it. So a token is kept as often as possible: `coupled` draws from the new distribution by the maximal
coupling with the token and distribution of the pass before (So et al. 2025, "MC-SJD"). This is exact as well: in raster
order neither the test of a position nor any distribution at or before it has seen what is drawn there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.decoding.speculative.drafter import DraftStart, Outcome
from vistok.decoding.speculative.tree import DraftTree, TreeBounds
from vistok.decoding.speculative.tree_drafting import draw_without_replacement
from vistok.decoding.streams import UniformSource

OPENINGS = ("repeat", "uniform")


class JacobiDrafter:
    """Drafts without a drafter.

    Args:
        window: tokens drafted at a time.
        coupled: keep drafted tokens from pass to pass as often as their distributions allow.
        opening: what the first draft of a position is drawn from: `"repeat"` takes the distribution of the position
            before it, `"uniform"` all tokens alike.

    Raises:
        ValueError: `window` is below 1, or an unknown opening.
    """

    def __init__(self, window: int = 8, *, coupled: bool = True, opening: str = "repeat") -> None:
        if window < 1:
            raise ValueError(f"a window has at least 1 token, got {window}")
        if opening not in OPENINGS:
            raise ValueError(f"unknown opening {opening!r}; choose one of {', '.join(OPENINGS)}")
        self.window = window
        self.coupled = coupled
        self.opening = opening

    def begin(self, start: DraftStart) -> JacobiSession:
        """Start with a batch; there is nothing that could not fit the target."""
        return JacobiSession(self, start)


class JacobiSession:
    """The drafts of one batch, for the `w` positions behind the root.

    Attributes:
        laws: `[b w v]`, what the next draft of every position is drawn from.
        old_tokens, old_laws: `[b w]` and `[b w v]`, its draft of the pass before and what that was drawn from.
        is_old: `[b w]`, whether there is one.
    """

    num_passes = 0

    def __init__(self, drafter: JacobiDrafter, start: DraftStart) -> None:
        self.drafter = drafter
        self.max_nodes = drafter.window
        logits = start.reading.logits  # [r 1 v]
        first = torch.zeros(start.batch_size, 1, dtype=torch.int64, device=logits.device)
        law = start.probabilities(logits, first).expand(-1, drafter.window, -1)
        self.old_tokens = first.expand(-1, drafter.window)
        self.is_old = torch.zeros_like(self.old_tokens, dtype=torch.bool)
        self.laws = self._opened(law, self.is_old)
        self.old_laws = self.laws

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        """Draw the window anew."""
        uniforms = streams.uniform(self.drafter.window, 2).to(self.laws.device, non_blocking=True)
        drafts = maximal_coupling(self.old_tokens, self.old_laws, self.laws, self.is_old, uniforms)
        tokens = torch.cat([roots[:, None], drafts], dim=1)
        parents = torch.arange(-1, self.drafter.window, device=tokens.device).expand_as(tokens)
        no_children = torch.zeros_like(self.laws[:, :1])
        return DraftTree(
            tokens,
            parents,
            torch.ones_like(tokens, dtype=torch.bool),
            torch.cat([self.laws, no_children], dim=1),
            TreeBounds.chain(self.drafter.window),
        )

    def commit(self, outcome: Outcome) -> None:
        """Move the window behind the new root, with the distributions of this pass."""
        tree, window = outcome.tree, self.drafter.window
        assert tree.draft_probs is not None
        nodes = outcome.counts[:, None] + torch.arange(window, device=outcome.counts.device)  # [b w]
        probs = outcome.probs  # [b w+1 v]
        read, drafted = nodes.clamp(max=window), (nodes + 1).clamp(max=window)
        self.laws = self._opened(_take(probs, read), (nodes <= window) & tree.exists.gather(1, read))
        self.old_tokens = tree.tokens.gather(1, drafted)
        self.old_laws = _take(tree.draft_probs, read)
        self.is_old = (nodes < window) & tree.exists.gather(1, drafted) & self.drafter.coupled

    def _opened(self, laws: Tensor, is_known: Tensor) -> Tensor:
        """`laws [b w v]`, which repeat the last one where nothing is known, or uniform ones there."""
        if self.drafter.opening == "repeat":
            return laws
        return torch.where(is_known[..., None], laws, 1 / laws.shape[-1])


def _take(values: Tensor, nodes: Tensor) -> Tensor:
    return values.gather(1, nodes[..., None].expand(-1, -1, values.shape[-1]))


def maximal_coupling(
    old_tokens: Tensor, old_laws: Tensor, laws: Tensor, is_old: Tensor, uniforms: Tensor
) -> Tensor:
    """Draw from `laws`, and the same tokens as before with the highest probability there is, one less the total variation.

    Args:
        old_tokens: `[b w]` int64, drawn from `old_laws`.
        old_laws, laws: `[b w v]`.
        is_old: `[b w]`; where it is False, the draw has nothing to do with the old token.
        uniforms: `[b w 2]` in [0, 1).

    Returns:
        `[b w]` int64.
    """
    old, new = (law.gather(2, old_tokens[..., None])[..., 0] for law in (old_laws, laws))
    is_kept = is_old & (uniforms[..., 0] * old < new)
    more = (laws - old_laws).clamp_min(0)
    draws_all = ~is_old | (more.sum(dim=2) <= 0)  # nothing is left by rounding only
    drawn, _ = draw_without_replacement(torch.where(draws_all[..., None], laws, more), uniforms[..., 1:])
    return torch.where(is_kept, old_tokens, drawn[..., 0])
