"""What a drafter is: it proposes a tree of tokens for every image, and hears which of them the target kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vistok.decoding.guidance import apply_guidance
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.tree import DraftTree
from vistok.decoding.streams import UniformSource
from vistok.models.generators.base import Condition, NextTokenGenerator, Reading
from vistok.models.identity import model_identity


@dataclass(frozen=True)
class DraftStart:
    """What a drafter is told at the beginning of a batch of images. Rows r are b, or 2b with guidance.

    Args:
        target: the generator that verifies.
        condition: of the r rows, the conditional ones first.
        reading: the target's of the prefix, r rows.
        guidance_scales: `[n]` float32; entry p is for the token at position p, 1.0 is off.
        sampling: how the target's tokens are drawn.
        is_guided: whether there are unconditional rows.
        batch_size: images, b.
    """

    target: NextTokenGenerator
    condition: Condition
    reading: Reading
    guidance_scales: Tensor
    sampling: SamplingParams
    is_guided: bool
    batch_size: int

    @property
    def num_tokens(self) -> int:
        """Of the longest image of the batch."""
        return len(self.guidance_scales)

    def rows(self, values: Tensor) -> Tensor:
        """What belongs to images `[b ...]` for the rows of a model, `[r ...]`."""
        return torch.cat([values, values]) if self.is_guided else values

    def guide(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Logits of all rows, guided as the target's are.

        Args:
            logits: `[r t v]`.
            positions: `[b t]` int64, of the token in its image that the logits predict; those beyond the end
                count as the last.

        Returns:
            `[b t v]` float32.
        """
        logits = logits.float()
        if not self.is_guided:
            return logits
        last = self.num_tokens - 1
        scales = self.guidance_scales.to(logits.device)[positions.to(logits.device).clamp(0, last)][..., None]
        cond, uncond = logits.chunk(2)
        return apply_guidance(cond, uncond, scales)

    def probabilities(self, logits: Tensor, positions: Tensor) -> Tensor:
        """As `guide`, then the distribution that tokens are drawn from, `[b t v]` float32."""
        return token_probabilities(self.guide(logits, positions), self.sampling)


@dataclass(frozen=True)
class Outcome:
    """What became of a tree. In a row with `counts` 0, whose image is done, nothing changed: it keeps its root.

    Args:
        tree: as it was verified; at the end of an image it is less deep than what was proposed.
        reading: the target's of all nodes, r rows.
        logits: `[b t v]` float32, the target's after guidance.
        probs: `[b t v]` float32, the distributions that the target's tokens are drawn from.
        path: `[b d]` int64 node ids from the root down to the last accepted node, filled up with -1.
        counts: `[b]` int64 nodes of the path, which are now in the target's cache: accepted tokens and the root.
        new_roots: `[b]` int64, the token that was drawn after the path.
    """

    tree: DraftTree
    reading: Reading
    logits: Tensor
    probs: Tensor
    path: Tensor
    counts: Tensor
    new_roots: Tensor


class DraftSession(Protocol):
    """The state of a drafter for one batch of images.

    Attributes:
        max_nodes: the most nodes below the root of any tree. It is fixed for the session and the same whatever the
            batch, as it also says how many uniforms a verification takes.
        num_passes: forward passes of the drafter so far.
    """

    max_nodes: int
    num_passes: int

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        """The next tree.

        Args:
            roots: `[b]` int64, the tokens drawn last, which the target has not read yet.
            num_committed: `[b]` int64, tokens that the target has read: the position of the root in its image.
            streams: for what is drawn; the shapes asked for must not depend on the batch nor on what was drawn.

        Returns:
            A tree of at most `max_nodes` nodes below each root. It may be deeper than the image is long: what is
            too deep is cut off.
        """
        ...

    def commit(self, outcome: Outcome) -> None:
        """Hear what became of the tree proposed last; see `Outcome` for images that are done."""
        ...


class Drafter(Protocol):
    """Something that drafts for a target; it has no state of its own while images are made."""

    def begin(self, start: DraftStart) -> DraftSession:
        """Start with a batch.

        Raises:
            ValueError: it was made for another vocabulary or another target.
        """
        ...


def check_same_vocabulary(name: str, codebook_size: int, target: NextTokenGenerator) -> None:
    """Raises ValueError unless the drafter `name` of so many token ids can draft for `target`."""
    if codebook_size != target.codebook_size:
        raise ValueError(
            f"{name} drafts {codebook_size} token ids, {type(target).__name__} has {target.codebook_size}: "
            "use a drafter made for this generator's codebook"
        )


def check_same_target(name: str, identity: str | None, target: NextTokenGenerator) -> None:
    """Raises ValueError where it is known which generator the drafter `name` was trained for, and it is another one."""
    if identity is not None and identity != (theirs := model_identity(target)):
        raise ValueError(
            f"{name} was trained for {identity}, this is {theirs}: use a drafter that was trained for this generator"
        )
