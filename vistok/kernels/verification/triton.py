"""Strict verification of a chain in one kernel, a program per row.

Whether the tokens are accepted takes a gather of two numbers for each; only where they end is a row of the vocabulary
read, for what is left of the target and the draw from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistok.kernels.sampling.triton import LARGEST_BLOCK, draw_from_row, launch_sizes


@triton.jit
def _rest_of_target(
    target, draft, scratch, rejected, has_rejected, vocab_size,
    HAS_DRAFT: tl.constexpr, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr,
):  # fmt: skip
    """What the `rejected` id leaves of a row of the target, not normalised, and its mass."""
    mass = tl.full((), 0.0, tl.float64)
    rest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        is_id = ids < vocab_size
        rest = tl.load(target + ids, mask=is_id, other=0.0)
        if HAS_DRAFT:
            covered = tl.where(has_rejected, tl.load(draft + ids, mask=is_id, other=0.0), 0.0)
            rest = tl.where(covered > rest, 0.0, rest - covered)
        else:
            rest = tl.where(has_rejected & (ids == rejected), 0.0, rest)
        mass += tl.sum(rest.to(tl.float64))
        if not IS_RESIDENT:
            tl.store(scratch + ids, rest, mask=is_id)
    if not IS_RESIDENT:
        tl.debug_barrier()
    return rest, mass


@triton.jit
def _verify_kernel(
    tokens, draft, target, uniforms, num_drafted, scratch, num_accepted, next_tokens,
    num_tokens, vocab_size, draft_stride_row, draft_stride_step, target_stride_row, target_stride_step,
    HAS_DRAFT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tokens += row * num_tokens
    uniforms += row * (num_tokens + 1)
    scratch += row * vocab_size
    target += row * target_stride_row
    draft += row * draft_stride_row
    count = tl.load(num_drafted + row).to(tl.int32)
    steps = tl.arange(0, BLOCK_T)
    is_drafted = steps < count
    ids = tl.load(tokens + steps, mask=is_drafted, other=0)
    chances = tl.load(target + steps * target_stride_step + ids, mask=is_drafted, other=0.0)
    is_possible = is_drafted
    if HAS_DRAFT:
        likelihoods = tl.load(draft + steps * draft_stride_step + ids, mask=is_drafted, other=0.0)
        is_possible = likelihoods > 0
        chances = tl.where(is_possible, tl.div_rn(chances, tl.where(is_possible, likelihoods, 1.0)), 0.0)
    passes = tl.load(uniforms + steps, mask=is_drafted, other=0.0) < chances
    accepted = tl.min(tl.where(is_drafted & (passes == 0), steps, count))
    tl.store(num_accepted + row, accepted.to(tl.int64))

    is_rejected = is_drafted & (steps == accepted)
    rejected = tl.sum(tl.where(is_rejected, ids, 0)).to(tl.int32)
    has_rejected = tl.sum((is_rejected & is_possible).to(tl.int32)) > 0
    target += accepted * target_stride_step
    draft += tl.minimum(accepted, num_tokens - 1) * draft_stride_step
    law, mass = _rest_of_target(
        target, draft, scratch, rejected, has_rejected, vocab_size, HAS_DRAFT, BLOCK, IS_RESIDENT
    )
    if has_rejected & (mass <= 0):  # rejected by rounding alone: the target as it is
        has_rejected = has_rejected & (mass > 0)
        law, mass = _rest_of_target(
            target, draft, scratch, rejected, has_rejected, vocab_size, HAS_DRAFT, BLOCK, IS_RESIDENT
        )
    uniform = tl.load(uniforms + num_tokens)
    token = draw_from_row(law, scratch, uniform, vocab_size, BLOCK, IS_RESIDENT)
    tl.store(next_tokens + row, token.to(tl.int64))


def triton_verify_chain(
    tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    uniforms: Tensor,
    num_drafted: Tensor,
    *,
    largest_block: int = LARGEST_BLOCK,
) -> tuple[Tensor, Tensor]:
    """See `verify_chain`; there is at least one token. Longer rows than `largest_block` are read in parts."""
    (batch_size, count), vocab_size = tokens.shape, target_probs.shape[2]
    target = target_probs if target_probs.stride(2) == 1 else target_probs.contiguous()
    draft = target if draft_probs is None else draft_probs
    draft = draft if draft.stride(2) == 1 else draft.contiguous()
    num_accepted, next_tokens = torch.empty_like(num_drafted), torch.empty_like(num_drafted)
    block, num_warps = launch_sizes(vocab_size, largest_block)
    is_resident = block >= vocab_size
    scratch = target if is_resident else target.new_empty(batch_size, vocab_size)
    with torch.cuda.device_of(tokens):
        _verify_kernel[(batch_size,)](
            tokens.contiguous(), draft, target, uniforms.float().contiguous(), num_drafted, scratch,
            num_accepted, next_tokens, count, vocab_size,
            draft.stride(0), draft.stride(1), target.stride(0), target.stride(1),
            HAS_DRAFT=draft_probs is not None,
            BLOCK_T=triton.next_power_of_2(count),
            BLOCK=block,
            IS_RESIDENT=is_resident,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return num_accepted, next_tokens
