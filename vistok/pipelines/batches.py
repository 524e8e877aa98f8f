"""Many images drawn some at a time: the memory of a batch for any number of them, and the same images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.compiled import CompiledGenerator
from vistok.decoding.given import Given
from vistok.decoding.sampling import LogitsProcessor
from vistok.decoding.speculative.generate import SpeculationStatistics
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Generator
from vistok.models.generators.text_features import TextFeatures
from vistok.pipelines.drawing import Conditions, Request, draw, num_steps
from vistok.pipelines.settings import Settings
from vistok.pipelines.speculation import SpeculativeDecoding, speculate
from vistok.tokens import Tokens, concatenate


@dataclass(frozen=True)
class Batches:
    """Which images of a call are drawn together.

    Args:
        lengths: `[b]` tokens of every image of the call.
        batch_size: images at a time; all of them when `None`.

    Raises:
        ValueError: a `batch_size` below 1.
    """

    lengths: Tensor
    batch_size: int | None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1 image, got {self.batch_size}; None draws all at once"
            )

    @property
    def parts(self) -> list[slice]:
        """The images of every batch."""
        total = len(self.lengths)
        size = self.batch_size or max(1, total)
        return [slice(start, start + size) for start in range(0, max(1, total), size)]

    def num_steps(self, model: Generator | CompiledGenerator, settings: Settings) -> int:
        """Steps until all are drawn."""
        return sum(num_steps(model, settings, self.lengths[part]) for part in self.parts)

    def draw(
        self,
        model: Generator | CompiledGenerator,
        settings: Settings,
        request: Request,
        speculation: SpeculativeDecoding | None = None,
    ) -> tuple[Tokens, SpeculationStatistics | None]:
        """The tokens of all images in their order, and what speculative decoding took, where it is used.

        `request.on_step` gets the steps of one batch after those of another.
        """
        drawn, statistics, done = [], [], 0
        for part in self.parts:
            batch = rows_of(request, part, first_step=done)
            if speculation is None:
                drawn.append(draw(model, settings, batch))
            else:
                assert isinstance(model, Generator)
                result = speculate(model, settings, batch, speculation)
                drawn.append(result.tokens)
                statistics.append(result.statistics)
            done += num_steps(model, settings, batch.lengths)
        if len(drawn) == 1:
            return drawn[0], statistics[0] if statistics else None
        return concatenate(drawn), joined(statistics) if statistics else None


def rows_of(request: Request, part: slice, *, first_step: int = 0) -> Request:
    """What is asked for some of the images, whose steps are counted from `first_step` on."""
    conditions, given = request.conditions, request.given

    def on_step(step: int, drawn: Tensor) -> None:
        request.on_step(first_step + step, drawn)

    return replace(
        request,
        conditions=Conditions(
            *(_rows(one, part) for one in (conditions.rows, conditions.null, conditions.later_null))
        ),
        streams=ImageStreams(request.streams.generators[part]),
        lengths=request.lengths[part],
        given=None if given is None else Given(given.indices[part], given.keep[part]),
        logits_processor=_processor(request.logits_processor, part),
        on_step=on_step,
    )


def _rows(condition: Any, part: slice) -> Any:
    if isinstance(condition, TextFeatures):
        return TextFeatures(condition.features[part], condition.keep[part])
    return None if condition is None else condition[part]


def _processor(processor: LogitsProcessor | None, part: slice) -> LogitsProcessor | None:
    """Of some rows, where the processor does not treat all rows alike: a watermark has a list for each."""
    rows = getattr(processor, "rows", None)
    return processor if rows is None else rows(part)


def joined(statistics: list[SpeculationStatistics]) -> SpeculationStatistics:
    """Of several batches, one after the other."""
    return SpeculationStatistics(
        num_drawn=torch.cat([one.num_drawn for one in statistics]),
        row_passes=torch.cat([one.row_passes for one in statistics]),
        target_passes=sum(one.target_passes for one in statistics),
        draft_passes=sum(one.draft_passes for one in statistics),
    )
