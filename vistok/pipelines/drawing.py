"""Drawing the tokens of a batch of images with any kind of generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vistok.decoding.compiled import CompiledGenerator
from vistok.decoding.flow_sampling import generate_flow
from vistok.decoding.given import Given
from vistok.decoding.mar_sampling import generate_mar
from vistok.decoding.masked import generate_masked
from vistok.decoding.ordered import StepCallback, generate_ordered
from vistok.decoding.sampling import LogitsProcessor
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Condition, Generator, MaskedGenerator, OrderedGenerator
from vistok.models.generators.mar import MAR
from vistok.models.generators.xar import XAR
from vistok.order import GivenFirst, PermutationOrder, RasterOrder
from vistok.pipelines.settings import (
    DiffusionSettings,
    FlowSettings,
    MaskedSettings,
    OrderedSettings,
    Settings,
)
from vistok.tokens import Tokens


@dataclass(frozen=True)
class Conditions:
    """What the images of a batch are drawn from, one row per image.

    Args:
        rows: the condition.
        null: what guidance leads away from; the model's own unconditional branch when `None`.
        later_null: likewise from the second step on, where it changes then.
    """

    rows: Condition
    null: Condition | None = None
    later_null: Condition | None = None

    def labels(self) -> tuple[Tensor, Tensor | None]:
        """`rows` and `null`, where they are class labels."""
        assert isinstance(self.rows, Tensor) and isinstance(self.null, Tensor | None)
        return self.rows, self.null


@dataclass(frozen=True)
class Request:
    """What a call asks of a loop besides its settings.

    Args:
        conditions: what the images are drawn from.
        streams: one per image.
        lengths: `[b]`, how many tokens of each image are wanted.
        given: tokens that stay.
        logits_processor: changes the guided logits of every step.
        on_step: called after every step.
    """

    conditions: Conditions
    streams: ImageStreams
    lengths: Tensor
    given: Given | None
    logits_processor: LogitsProcessor | None
    on_step: StepCallback


def num_steps(model: Generator | CompiledGenerator, settings: Settings, lengths: Tensor) -> int:
    """Steps until images of `lengths [b]` are drawn."""
    if isinstance(settings, MaskedSettings):
        return settings.num_inference_steps
    if isinstance(settings, DiffusionSettings):
        assert settings.num_steps is not None
        return settings.num_steps
    assert isinstance(model, OrderedGenerator | CompiledGenerator | XAR)
    return int(lengths.max()) if isinstance(model.order, RasterOrder) else model.order.num_steps


def check_codes(model: Generator, *, has_given: bool, logits_processor: LogitsProcessor | None) -> None:
    """Raises ValueError when a generator of continuous tokens is asked for what only one of codes can do."""
    name = type(model).__name__
    if model.codebook_size is None and has_given:
        raise ValueError(
            f"{name} draws all of its continuous tokens: tokens and keep need a generator of codes"
        )
    if model.codebook_size is None and logits_processor is not None:
        raise ValueError(
            f"{name} draws continuous tokens and has no logits: a logits_processor needs a generator of codes"
        )


def followed_order(model: Generator, given: Given | None) -> Generator:
    """`model`, or its like that decides first what is given, if it was trained to follow any order.

    So all tokens that are drawn see all that are given, whereas in a fixed order they see only those before them.

    Raises:
        ValueError: the images of the batch keep different tokens, which would need an order each.
    """
    if (
        given is None
        or not isinstance(model, OrderedGenerator)
        or not isinstance(model.order, PermutationOrder)
    ):
        return model
    if not bool((given.keep == given.keep[:1]).all()):
        raise ValueError(
            f"{type(model).__name__} decides first what is given: keep must be the same for all images of a call"
        )
    positions = tuple(given.keep[0].nonzero()[:, 0].tolist())
    return model.with_order(GivenFirst(model.num_tokens, model.order, positions))


def draw(model: Generator | CompiledGenerator, settings: Settings, request: Request) -> Tokens:
    """The first `request.lengths` tokens of every image, with the loop that goes with the settings."""
    return LOOPS[type(settings)](model, settings, request).keep(request.lengths)


def _draw_ordered(
    model: OrderedGenerator | CompiledGenerator, settings: OrderedSettings, request: Request
) -> Tokens:
    given, most = request.given, int(request.lengths.max())
    return generate_ordered(
        model,
        request.conditions.rows,
        streams=request.streams,
        num_tokens=request.lengths,
        sampling=settings.sampling,
        guidance=settings.guidance(model.order),
        null_condition=request.conditions.null,
        later_null_condition=request.conditions.later_null,
        given=None if given is None else Given(given.indices[:, :most], given.keep[:, :most]),
        logits_processor=request.logits_processor,
        on_step=request.on_step,
    )


def _draw_masked(model: MaskedGenerator, settings: MaskedSettings, request: Request) -> Tokens:
    labels, null_labels = request.conditions.labels()
    indices = generate_masked(
        model,
        labels,
        streams=request.streams,
        sampling=settings.sampling,
        guidance=settings.guidance,
        null_labels=null_labels,
        given=request.given,
        logits_processor=request.logits_processor,
        reuse=settings.reuse,
        on_step=request.on_step,
    )
    return Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout)


def _draw_flow(model: XAR, settings: FlowSettings, request: Request) -> Tokens:
    labels, null_labels = request.conditions.labels()
    return generate_flow(
        model,
        labels,
        streams=request.streams,
        num_inference_steps=settings.denoising_steps(model.order.num_steps),
        head=settings.head,
        guidance=settings.guidance,
        null_labels=null_labels,
        on_step=request.on_step,
    )


def _draw_mar(model: MAR, settings: DiffusionSettings, request: Request) -> Tokens:
    labels, null_labels = request.conditions.labels()
    steps = num_steps(model, settings, request.lengths)
    return generate_mar(
        model,
        labels,
        streams=request.streams,
        num_steps=steps,
        num_inference_steps=settings.denoising_steps(steps),
        head=settings.head,
        guidance=settings.guidance,
        null_labels=null_labels,
        reuse=settings.reuse,
        on_step=request.on_step,
    )


LOOPS: dict[type[Settings], Callable[[Any, Any, Request], Tokens]] = {
    OrderedSettings: _draw_ordered,
    MaskedSettings: _draw_masked,
    FlowSettings: _draw_flow,
    DiffusionSettings: _draw_mar,
}
