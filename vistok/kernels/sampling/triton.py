"""Guidance, filters and the draw in one kernel: a program per image and position passes over its row of logits.

A row that fits is held in registers. Of a longer one, what a pass makes of the logits lies in a scratch row of global
memory, which the chip's caches hold. Thresholds are found by bisection over the bits of float32, sums are float64: tokens
are those of the reference but where a uniform, or a mass, is within rounding of a boundary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 16384  # ids of a row in registers at a time
BITS_OF_ONE = tl.constexpr(0x3F800000)


@triton.jit
def draw_from_row(weights, scratch, uniform, vocab_size, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr):
    """The id whose share of the cumulative weights holds `uniform`; -1 where one is NaN, or none above 0.

    Args:
        weights: `[BLOCK]` float32 of a row that is held, 0 beyond the vocabulary.
        scratch: pointer to those of another.
        uniform: in [0, 1).
    """
    part = weights
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab_size, BLOCK):
        if not IS_RESIDENT:
            ids = start + tl.arange(0, BLOCK)
            part = tl.load(scratch + ids, mask=ids < vocab_size, other=0.0)
        total += tl.sum(part.to(tl.float64))
    target = uniform.to(tl.float64) * total
    before = tl.full((), 0.0, tl.float64)
    token, last = vocab_size + tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        if not IS_RESIDENT:
            part = tl.load(scratch + ids, mask=ids < vocab_size, other=0.0)
        cumulative = before + tl.cumsum(part.to(tl.float64), 0)
        is_past = (cumulative > target) & (part > 0)  # an id without weight is never drawn
        token = tl.minimum(token, tl.min(tl.where(is_past, ids, vocab_size)))
        last = tl.maximum(last, tl.max(tl.where(part > 0, ids, -1)))
        before += tl.sum(part.to(tl.float64))
    token = tl.where(token < vocab_size, token, last)  # rounding can leave the target behind the last id
    return tl.where(total > 0, token, -1)


@triton.jit
def _read_row(
    logits, uncond, scratch, scale, temperature, vocab_size,
    IS_GUIDED: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr,
):  # fmt: skip
    """Guided logits over the temperature, their largest and their smallest."""
    largest, smallest = tl.full((), float("-inf"), tl.float32), tl.full((), float("inf"), tl.float32)
    x = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        is_id = ids < vocab_size
        x = tl.load(logits + ids, mask=is_id, other=0.0).to(tl.float32)
        if IS_GUIDED:
            without = tl.load(uncond + ids, mask=is_id, other=0.0).to(tl.float32)
            x = tl.where(scale == 1.0, x, without + scale * (x - without))
        if HAS_TEMPERATURE:
            x = tl.div_rn(x, temperature)
        smallest = tl.minimum(smallest, tl.min(tl.where(is_id, x, float("inf"))))
        x = tl.where(is_id, x, float("-inf"))
        largest = tl.maximum(largest, tl.max(x))
        if not IS_RESIDENT:
            tl.store(scratch + ids, x, mask=is_id)
    if not IS_RESIDENT:
        tl.debug_barrier()
    return x, largest, smallest


@triton.jit
def _flip(bits):
    """From the bits of float32, as int32, to numbers that rise as the floats do; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(
    x, scratch, smallest, largest, top_k, vocab_size, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr
):
    """A bound: at or above it lie the `top_k` largest of a row, and what equals the last of them, and no others."""
    low = _flip(smallest.to(tl.int32, bitcast=True)).to(tl.int64)
    high = _flip(largest.to(tl.int32, bitcast=True)).to(tl.int64)
    part = x
    while low < high:
        middle = low + (high - low + 1) // 2
        number = middle.to(tl.int32)
        bound = (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        count = tl.full((), 0, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            if not IS_RESIDENT:
                part = tl.load(scratch + ids, mask=ids < vocab_size, other=float("-inf"))
            count += tl.sum(((part >= bound) & (ids < vocab_size)).to(tl.int32))
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count > top_k, high, tl.where(count == top_k, middle, middle - 1))
    return _flip(low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _weigh(x, scratch, largest, bound, vocab_size, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr):
    """Weights of which the largest is 1, 0 for logits below `bound`, and their sum.

    The sum is NaN where the logits are no distribution: one is NaN, or the largest is infinite.
    """
    total = tl.full((), 0.0, tl.float64)
    weights = x
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        if not IS_RESIDENT:
            x = tl.load(scratch + ids, mask=ids < vocab_size, other=float("-inf"))
        weights = tl.where((x < bound) | (ids >= vocab_size), 0.0, tl.exp(x - largest))
        total += tl.sum(weights.to(tl.float64))
        if not IS_RESIDENT:
            tl.store(scratch + ids, weights, mask=ids < vocab_size)
    if not IS_RESIDENT:
        tl.debug_barrier()
    return weights, total


@triton.jit
def _keep_mass(weights, scratch, total, mass, vocab_size, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr):
    """Weights with 0 for what is not of the smallest set of most probable ids that reaches `mass`.

    An id is kept while the mass before it is less. Bits of float32 above 0 rise with them: the smallest with less mass
    above them are those of the last probability that is kept; of the ids that have it, as many as it takes, by rising
    id.
    """
    low, high = tl.full((), 0, tl.int32), tl.full((), BITS_OF_ONE, tl.int32)
    before = tl.full((), 0.0, tl.float64)  # the mass above `high`
    norm = total.to(tl.float32)
    part = tl.div_rn(weights, norm)
    while low < high:
        middle = (low + high) // 2
        bound = middle.to(tl.float32, bitcast=True)
        above = tl.full((), 0.0, tl.float64)
        for start in range(0, vocab_size, BLOCK):
            if not IS_RESIDENT:
                ids = start + tl.arange(0, BLOCK)
                part = tl.div_rn(tl.load(scratch + ids, mask=ids < vocab_size, other=0.0), norm)
            above += tl.sum(tl.where(part > bound, part, 0.0).to(tl.float64))
        low = tl.where(above < mass, low, middle + 1)
        high = tl.where(above < mass, middle, high)
        before = tl.where(above < mass, above, before)
    bound = low.to(tl.float32, bitcast=True)
    num_equal = tl.full((), 0, tl.int32)
    kept = part
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        if not IS_RESIDENT:
            part = tl.div_rn(tl.load(scratch + ids, mask=ids < vocab_size, other=0.0), norm)
        is_last = (part == bound).to(tl.int32)
        rank = num_equal + tl.cumsum(is_last, 0) - is_last  # among the equal ones
        fits = (part == bound) & (before + rank.to(tl.float64) * part.to(tl.float64) < mass)
        kept = tl.where((part > bound) | fits, part, 0.0)
        num_equal += tl.sum(is_last)
        if not IS_RESIDENT:
            tl.store(scratch + ids, kept, mask=ids < vocab_size)
    if not IS_RESIDENT:
        tl.debug_barrier()
    return kept


@triton.jit
def _sample_kernel(
    logits, uniforms, scales, scratch, tokens,
    vocab_size, num_positions, stride_row, stride_position, uncond_offset,
    stride_scale_row, stride_scale_position, guidance_scale, temperature, top_k, top_p_high, top_p_low,
    IS_GUIDED: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, BLOCK: tl.constexpr, IS_RESIDENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, position = program // num_positions, program % num_positions
    logits += row * stride_row + position * stride_position
    scratch += program * vocab_size
    scale = guidance_scale
    if HAS_SCALES:
        scale = tl.load(scales + row * stride_scale_row + position * stride_scale_position)
    x, largest, smallest = _read_row(
        logits, logits + uncond_offset, scratch, scale, temperature, vocab_size,
        IS_GUIDED, HAS_TEMPERATURE, BLOCK, IS_RESIDENT,
    )  # fmt: skip
    bound = smallest
    if HAS_TOP_K:
        bound = _kth_largest(x, scratch, smallest, largest, top_k, vocab_size, BLOCK, IS_RESIDENT)
    weights, total = _weigh(x, scratch, largest, bound, vocab_size, BLOCK, IS_RESIDENT)
    if HAS_TOP_P:
        mass = tl.full((), 0.0, tl.float64) + top_p_high + top_p_low
        weights = _keep_mass(weights, scratch, total, mass, vocab_size, BLOCK, IS_RESIDENT)
    token = draw_from_row(weights, scratch, tl.load(uniforms + program), vocab_size, BLOCK, IS_RESIDENT)
    tl.store(tokens + program, token.to(tl.int64))


def triton_sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    guidance_scale: float | Tensor,
    largest_block: int = LARGEST_BLOCK,
) -> Tensor:
    """See `sample_tokens`; `largest_block`, a power of two, says which rows are read in parts."""
    scales, scale = None, 1.0
    if isinstance(guidance_scale, Tensor):
        scales = guidance_scale.float()
    else:
        scale = float(guidance_scale)
    arguments = (logits, uniforms, scales, scale, temperature, top_k, top_p, largest_block)
    if torch.compiler.is_compiling():
        return _sample_opaquely(*arguments)
    return _sample(*arguments)


def _sample(
    logits: Tensor,
    uniforms: Tensor,
    scales: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
    largest_block: int,
) -> Tensor:
    batch_size, num_positions = uniforms.shape
    vocab_size, device = logits.shape[2], logits.device
    tokens = torch.empty(batch_size, num_positions, dtype=torch.int64, device=device)
    if not tokens.numel():
        return tokens
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    uniforms = uniforms.to(device, torch.float32, non_blocking=True).contiguous()
    block, num_warps = launch_sizes(vocab_size, largest_block)
    is_resident = block >= vocab_size
    scratch = tokens if is_resident else torch.empty(*tokens.shape, vocab_size, device=device)
    per_position = uniforms if scales is None else scales.expand(batch_size, num_positions, 1)
    high, low = split_float64(top_p)
    with torch.cuda.device_of(logits):
        _sample_kernel[(tokens.numel(),)](
            logits, uniforms, per_position, scratch, tokens,
            vocab_size, num_positions, logits.stride(0), logits.stride(1), batch_size * logits.stride(0),
            per_position.stride(0), per_position.stride(1), guidance_scale, temperature, top_k or 0, high, low,
            IS_GUIDED=len(logits) == 2 * batch_size and (scales is not None or guidance_scale != 1.0),
            HAS_SCALES=scales is not None,
            HAS_TEMPERATURE=temperature != 1.0,
            HAS_TOP_K=top_k is not None and top_k < vocab_size,
            HAS_TOP_P=top_p < 1.0,
            BLOCK=block,
            IS_RESIDENT=is_resident,
            num_warps=num_warps,
            enable_fp_fusion=False,  # guided logits that are equal in the reference are equal here
        )  # fmt: skip
    return tokens


@torch.library.custom_op("vistok::sample_tokens", mutates_args=())
def _sample_opaquely(
    logits: Tensor,
    uniforms: Tensor,
    scales: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
    largest_block: int,
) -> Tensor:
    """`_sample` for torch.compile, which does not look inside."""
    return _sample(logits, uniforms, scales, guidance_scale, temperature, top_k, top_p, largest_block)


@_sample_opaquely.register_fake
def _(logits: Tensor, uniforms: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(uniforms, dtype=torch.int64, device=logits.device)


def launch_sizes(vocab_size: int, largest_block: int) -> tuple[int, int]:
    """Ids in registers at a time, and warps that share them."""
    block = triton.next_power_of_2(vocab_size)
    if block > largest_block:
        block = largest_block // 2  # what waits in memory must not wait in registers as well
    return block, min(max(block // 512, 4), 16)


def split_float64(value: float) -> tuple[float, float]:
    """Two float32 whose sum is `value` to 48 bits: a kernel takes no float64 from the host."""
    high = float(torch.tensor(value, dtype=torch.float32))
    return high, value - high
