"""What is asked of a server, and what it gives for it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule
from vistok.decoding.ordered import check_num_tokens
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.streams import ImageStreams, UniformSource
from vistok.models.generators.base import Condition, NextTokenGenerator
from vistok.models.generators.text_features import TextFeatures
from vistok.tokens import Tokens


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Request:
    """One image.

    Args:
        condition: one row of what the model is conditioned on.
        seed: of its random stream.
        stream: instead of the seed, a source of one row. All that the image takes is drawn from it by `submit`.
        num_tokens: stop after so many; all that the server has room for by default.
        sampling: how a token is drawn.
        guidance: scale per token, the steps being `num_tokens`. While a scale other than 1.0 is to come, the request
            takes two slots.
        null_condition: of the unconditional branch, one row; the model's own by default.
        priority: lower ones go first; among equals, first come, first served.
    """

    condition: Condition
    seed: int = 0
    stream: UniformSource | None = None
    num_tokens: int | None = None
    sampling: SamplingParams = SamplingParams()
    guidance: GuidanceSchedule = ConstantGuidance()
    null_condition: Condition | None = None
    priority: int = 0


class Ticket(Future[Tokens]):
    """What `Server.submit` gives: a future of the image's `Tokens [1 n]`.

    `result(timeout)` waits for them, or raises what became of the request instead; `cancel()` is possible until then,
    also while the image is drawn, and frees its slots at the next step.

    Attributes:
        request_id: counts the requests of a server.
        request: what was asked.
    """

    def __init__(self, request_id: int, request: Request) -> None:
        super().__init__()
        self.request_id = request_id
        self.request = request


@dataclass(frozen=True)
class Job:
    """A request that was found to be possible.

    Args:
        ticket: who waits for it.
        null: what guidance leads away from; `None` where no token is guided.
        scales: of guidance, one per token.
        uniforms: `[n]` on the CPU, one per token: all draws of the image.
    """

    ticket: Ticket
    null: Condition | None
    scales: tuple[float, ...]
    uniforms: Tensor

    @property
    def num_tokens(self) -> int:
        """How many are drawn."""
        return len(self.scales)

    @property
    def num_guided(self) -> int:
        """Tokens up to the last one that is guided."""
        return max((place + 1 for place, scale in enumerate(self.scales) if scale != 1.0), default=0)

    @property
    def num_rows(self) -> int:
        """Slots that it takes at first."""
        return 1 if self.null is None else 2


def make_job(model: NextTokenGenerator, ticket: Ticket, most: int) -> Job:
    """Check a request against a model with room for `most` tokens, and say what it takes.

    Raises:
        ValueError: a condition of another kind or not one row, `num_tokens` outside `1..most`, a `top_k` beyond the
            codebook, guidance without a null condition where the model has none of its own, a stream of several rows.
    """
    request = ticket.request
    check_condition(model, request.condition, "condition")
    if request.null_condition is not None:
        check_condition(model, request.null_condition, "null_condition")
    num_tokens = int(check_num_tokens(most if request.num_tokens is None else request.num_tokens, 1, most)[0])
    request.sampling.check_vocabulary(model.codebook_size)
    scales = tuple(request.guidance.at(place, num_tokens) for place in range(num_tokens))
    null = None
    if any(scale != 1.0 for scale in scales):
        null = request.null_condition
        null = model.null_condition_for(request.condition) if null is None else null
    return Job(ticket, null, scales, _draw_all(request, num_tokens))


def _draw_all(request: Request, num_tokens: int) -> Tensor:
    """What a loop would draw token by token, `[n]`."""
    streams = ImageStreams.from_seeds([request.seed]) if request.stream is None else request.stream
    uniforms = torch.cat([streams.uniform(1) for _ in range(num_tokens)], dim=1)  # [1 n]
    if len(uniforms) != 1:
        raise ValueError(f"the stream of a request must have one row, this one has {len(uniforms)}")
    return uniforms[0]


def check_condition(model: NextTokenGenerator, condition: Any, name: str) -> None:
    """Raises ValueError unless `condition` is one row of the kind that the model reads."""
    config: Any = model.config
    if "text_encoder" in config:
        expected = f"the TextFeatures of one text, {config['text_dim']} wide"
        is_fine = isinstance(condition, TextFeatures) and (
            (len(condition), condition.features.shape[2]) == (1, config["text_dim"])
        )
    else:
        like = model.null_condition(1)
        assert isinstance(like, Tensor)
        expected = _in_words(like)
        is_fine = _in_words(condition) == expected
    if not is_fine:
        raise ValueError(
            f"{name} of a request to a {type(model).__name__} must be {expected}; got {_in_words(condition)}"
        )


def _in_words(condition: Any) -> str:
    if isinstance(condition, TextFeatures):
        return f"TextFeatures {list(condition.features.shape)}"
    if isinstance(condition, Tensor):
        return f"a tensor {list(condition.shape)} of {condition.dtype}"
    return f"a {type(condition).__name__}"
