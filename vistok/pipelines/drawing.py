"""Drawing the tokens of a batch of images with any kind of generator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vistok.decoding.given import Given
from vistok.decoding.masked import generate_masked
from vistok.decoding.ordered import StepCallback, generate_ordered
from vistok.decoding.sampling import LogitsProcessor
from vistok.decoding.streams import UniformSource
from vistok.models.generators.base import Condition, Generator, MaskedGenerator, OrderedGenerator
from vistok.order import GivenFirst, PermutationOrder, RasterOrder
from vistok.pipelines.settings import MaskedSettings, OrderedSettings, Settings
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


def num_steps(model: Generator, settings: Settings, lengths: Tensor) -> int:
    """Steps until images of `lengths [b]` are drawn."""
    if isinstance(settings, MaskedSettings):
        return settings.num_inference_steps
    assert isinstance(model, OrderedGenerator)
    return int(lengths.max()) if isinstance(model.order, RasterOrder) else model.order.num_steps


def followed_order(model: Generator, given: Given | None) -> Generator:
    """`model`, or its like that decides first what is given, if it was trained to follow any order.

    So all tokens that are drawn see all that are given, whereas in a fixed order they see only those before them.

    Raises:
        ValueError: the images of the batch keep different tokens, which would need an order each.
    """
    if given is None or not isinstance(model, OrderedGenerator) or not isinstance(model.order, PermutationOrder):
        return model
    if not bool((given.keep == given.keep[:1]).all()):
        raise ValueError(
            f"{type(model).__name__} decides first what is given: keep must be the same for all images of a call"
        )
    positions = tuple(given.keep[0].nonzero()[:, 0].tolist())
    return model.with_order(GivenFirst(model.num_tokens, model.order, positions))


def draw(
    model: Generator,
    conditions: Conditions,
    settings: Settings,
    *,
    streams: UniformSource,
    lengths: Tensor,
    given: Given | None,
    logits_processor: LogitsProcessor | None,
    on_step: StepCallback,
) -> Tokens:
    """The first `lengths [b]` tokens of every image, with the loop of the model's kind."""
    if isinstance(model, MaskedGenerator):
        assert isinstance(settings, MaskedSettings) and isinstance(conditions.rows, Tensor)
        indices = generate_masked(
            model,
            conditions.rows,
            streams=streams,
            sampling=settings.sampling,
            guidance=settings.guidance,
            null_labels=conditions.null,  # type: ignore[arg-type]
            given=given,
            logits_processor=logits_processor,
            on_step=on_step,
        )
        return Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout).keep(lengths)
    assert isinstance(model, OrderedGenerator) and isinstance(settings, OrderedSettings)
    return generate_ordered(
        model,
        conditions.rows,
        streams=streams,
        num_tokens=lengths,
        sampling=settings.sampling,
        guidance=settings.guidance(model.order),
        null_condition=conditions.null,
        later_null_condition=conditions.later_null,
        given=None if given is None else _first(given, int(lengths.max())),
        logits_processor=logits_processor,
        on_step=on_step,
    )


def _first(given: Given, num_tokens: int) -> Given:
    return Given(given.indices[:, :num_tokens], given.keep[:, :num_tokens])
