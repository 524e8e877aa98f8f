"""The loop of every generator with a fixed order: prefill, then one step's tokens after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.compiled import CompiledGenerator
from vistok.decoding.given import Given
from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.sampling import LogitsProcessor, SamplingParams
from vistok.decoding.streams import UniformSource
from vistok.kernels.sampling import sample_tokens
from vistok.models.generators.base import Condition, OrderedGenerator, join_conditions
from vistok.order import Order, RasterOrder
from vistok.tokens import Tokens

StepCallback = Callable[[int, Tensor], None]  # (step, indices [b n], decided up to and including the step)


@torch.no_grad()
def generate_ordered(
    model: OrderedGenerator | CompiledGenerator,
    condition: Condition,
    *,
    streams: UniformSource,
    num_tokens: int | Sequence[int] | Tensor | None = None,
    sampling: SamplingParams | None = None,
    guidance: GuidanceSchedule | None = None,
    null_condition: Condition | None = None,
    later_null_condition: Condition | None = None,
    given: Given | None = None,
    logits_processor: LogitsProcessor | None = None,
    on_step: StepCallback | None = None,
) -> Tokens:
    """Sample the tokens of a batch of images, those of one step independently of each other.

    The tokens of an image do not depend on where it or its neighbours stop.

    Args:
        model: a generator with an order, or one whose steps are compiled.
        condition: what the model is conditioned on, batch axis first; see the model's `prefill`.
        streams: one uniform draw per image and position is taken from it, all before the first step.
        num_tokens: stop after so many tokens, one number for all images or one per image `[b]`; all by default. Fewer
            are possible in raster order only.
        sampling: how a token is drawn.
        guidance: scale per step; with a scale of 1.0 the unconditional branch is not computed at all.
        null_condition: of the unconditional branch, one row per image; the model's own by default.
        later_null_condition: of the unconditional branch from the second step on, where it changes then.
        given: tokens that are not drawn. A token can only follow from given ones that the order decides before it.
        logits_processor: changes the guided logits of every step before a token is drawn.
        on_step: called after every step.

    Returns:
        Tokens `[b n]` with `n` the largest of `num_tokens`.

    Raises:
        ValueError: `num_tokens` is out of range, not one per image or not possible; `given` does not fit; there is no
            image to draw; the logits of a step are no distribution.
    """
    sampling, guidance = sampling or SamplingParams(), guidance or ConstantGuidance()
    batch_size, device = len(condition), model.device
    lengths = check_num_tokens(num_tokens, batch_size, model.num_tokens)
    order = _cut(model.order, int(lengths.max()))
    if given is not None:
        given.check(batch_size, order.num_tokens, model.codebook_size)
        given = given.to(device)
    is_guided = guidance.scale != 1.0
    rows = condition
    if is_guided:
        null = model.null_condition_for(condition) if null_condition is None else null_condition
        rows = join_conditions(condition, null)
    sizes = [len(positions) for positions in order.plan()]
    steps = order.sequence().to(device).split(sizes)
    uniforms = streams.uniform(order.num_tokens).to(device).split(sizes, dim=1)
    indices = torch.zeros(batch_size, order.num_tokens, dtype=torch.int64, device=device)
    cache: Any = model.new_cache(len(rows), order.num_tokens)
    logits = model.prefill(rows.to(device), cache)  # [b k v], or [2b k v] when guided
    for step, positions in enumerate(steps):
        scale = guidance.at(step, order.num_steps) if is_guided else 1.0
        drawn = _draw(logits, uniforms[step], sampling, scale, logits_processor)  # [b k]
        decided = drawn if given is None else given.put(drawn, positions)
        indices[:, positions] = decided
        if on_step is not None:
            on_step(step, indices.clamp_min(0))
        if step + 1 == order.num_steps:
            break
        if step == 0 and is_guided and later_null_condition is not None:
            cache = None  # so that there are not two of them
            cache = model.new_cache(len(rows), order.num_tokens)
            model.prefill(join_conditions(condition, later_null_condition).to(device), cache)
        decided = decided.clamp_min(0)
        logits = model.step(decided.repeat(2, 1) if is_guided else decided, cache)
    if isinstance(order, RasterOrder):  # what lies behind the end of an image does not count
        indices = indices.masked_fill(
            torch.arange(order.num_tokens, device=device) >= lengths.to(device)[:, None], 0
        )
    check_drawn(indices, order)
    return Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout).keep(lengths)


def _draw(
    logits: Tensor,
    uniforms: Tensor,
    sampling: SamplingParams,
    guidance_scale: float,
    processor: LogitsProcessor | None,
) -> Tensor:
    """Tokens `[b k]` from logits `[b k v]`, or `[2b k v]` when guided."""
    if processor is not None:
        if len(logits) == 2 * len(uniforms):
            cond, uncond = logits.float().chunk(2)
            logits = apply_guidance(cond, uncond, guidance_scale)
        logits, guidance_scale = processor(logits.float()), 1.0
    return sample_tokens(logits, uniforms, **asdict(sampling), guidance_scale=guidance_scale)


def check_drawn(indices: Tensor, order: Order) -> None:
    """Raises ValueError, naming rows of the batch and the step, where a token is -1: its logits were no distribution."""
    failed = indices < 0
    if not bool(failed.any()):
        return
    steps = order.decided_at().to(failed.device).expand_as(failed)
    first = int(steps[failed].min())
    rows = failed.any(dim=1).nonzero()[:, 0].tolist()
    raise ValueError(
        f"at step {first} of {order.num_steps} the logits of row {', '.join(map(str, rows))} were no distribution "
        "(NaN, infinite, or everything excluded): are these the weights of this model, and does it run in float32?"
    )


def _cut(order: Order, num_tokens: int) -> Order:
    """The order of the first `num_tokens` positions."""
    if num_tokens == order.num_tokens:
        return order
    if not isinstance(order, RasterOrder):
        raise ValueError(
            f"a generator in {type(order).__name__} makes all {order.num_tokens} tokens, it cannot stop after {num_tokens}"
        )
    return RasterOrder(num_tokens)


def check_num_tokens(num_tokens: int | Sequence[int] | Tensor | None, batch_size: int, most: int) -> Tensor:
    """One length per image, `[b]` int64.

    Raises:
        ValueError: a length outside `1..most`, not an integer, or not one per image; no image.
    """
    if not batch_size:
        raise ValueError("the batch is empty: there is no image to draw")
    if num_tokens is None:
        num_tokens = most
    lengths = torch.as_tensor(num_tokens)
    if lengths.dtype != torch.int64 or lengths.shape not in ((), (batch_size,)):
        raise ValueError(
            f"num_tokens must be one integer or {batch_size} of them, one per image; "
            f"got {lengths.dtype} {list(lengths.shape)}"
        )
    if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= most:
        raise ValueError(f"num_tokens must be in 1..{most}, got {lengths.tolist()}")
    return lengths.expand(batch_size)
