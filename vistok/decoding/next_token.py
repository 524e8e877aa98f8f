"""The next-token loop: prefill, then one sampled token after the other, until every image has its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, apply_guidance
from vistok.decoding.sampling import SamplingParams, sample
from vistok.decoding.streams import UniformSource
from vistok.models.generators.base import Condition, NextTokenGenerator, join_conditions
from vistok.order import RasterOrder
from vistok.tokens import Tokens

StepCallback = Callable[[int, Tensor], None]  # (step, indices [b n], decided up to and including the step)


@torch.inference_mode()
def generate_next_token(
    model: NextTokenGenerator,
    condition: Condition,
    *,
    streams: UniformSource,
    num_tokens: int | Sequence[int] | Tensor | None = None,
    sampling: SamplingParams | None = None,
    guidance: GuidanceSchedule | None = None,
    null_condition: Condition | None = None,
    later_null_condition: Condition | None = None,
    on_step: StepCallback | None = None,
) -> Tokens:
    """Sample the tokens of a batch of images.

    The tokens of an image do not depend on where it or its neighbours stop.

    Args:
        model: a next-token generator.
        condition: what the model is conditioned on, batch axis first; see the model's `prefill`.
        streams: one uniform draw per image and step is taken from it.
        num_tokens: stop after so many tokens, one number for all images or one per image `[b]`; all by default.
        sampling: how a token is drawn.
        guidance: scale per step; with a scale of 1.0 the unconditional branch is not computed at all.
        null_condition: of the unconditional branch, one row per image; the model's own by default.
        later_null_condition: of the unconditional branch from the second token on, where it changes then.
        on_step: called after every step.

    Returns:
        Tokens `[b n]` with `n` the largest of `num_tokens`.

    Raises:
        ValueError: `num_tokens` is out of range or not one per image.
    """
    sampling, guidance = sampling or SamplingParams(), guidance or ConstantGuidance()
    batch_size = len(condition)
    lengths = check_num_tokens(num_tokens, batch_size, model.num_tokens)
    is_guided = guidance.scale != 1.0
    rows = condition
    if is_guided:
        null = model.null_condition(batch_size) if null_condition is None else null_condition
        rows = join_conditions(condition, null)
    order = RasterOrder(int(lengths.max()))
    indices = torch.zeros(batch_size, order.num_tokens, dtype=torch.int64, device=model.device)
    cache = model.new_cache(len(rows), order.num_tokens)
    logits = model.prefill(rows.to(model.device), cache)  # [b v], or [2b v] when guided
    for step in range(order.num_steps):
        if is_guided:
            cond, uncond = logits.float().chunk(2)
            logits = apply_guidance(cond, uncond, guidance.at(step, order.num_steps))
        indices[:, step] = sample(logits, sampling, streams.uniform()).to(indices.device)
        if on_step is not None:
            on_step(step, indices)
        if step + 1 == order.num_steps:
            break
        if step == 0 and is_guided and later_null_condition is not None:
            cache.rollback(0)
            model.prefill(join_conditions(condition, later_null_condition).to(model.device), cache)
        token = indices[:, step].repeat(2) if is_guided else indices[:, step]
        logits = model.step(token, cache)
    return Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout).keep(lengths)


def check_num_tokens(num_tokens: int | Sequence[int] | Tensor | None, batch_size: int, most: int) -> Tensor:
    """One length per image, `[b]` int64.

    Raises:
        ValueError: a length outside `1..most`, not an integer, or not one per image.
    """
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
