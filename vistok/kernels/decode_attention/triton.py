"""Decode attention in Triton: rotation, cache write and attention in one kernel, split over the stored positions.

One program serves all queries of a row that share a key head, as FlashAttention does (Dao et al. 2022, section 3), over
one part of the stored positions; a second kernel joins the parts (flash-decoding: Dao et al. 2023). No program reads what
another one writes: the new keys and values are taken from the inputs.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistok.kernels.rotation import Rotation
from vistok.kernels.triton_support import is_interpreting

MOST_PARTS = 32
KEYS_PER_PART = 256  # fewer are read sooner than a second kernel starts
TILE_BYTES = 8192  # of queries, keys or values; larger ones spill registers (compiled for sm_80 and sm_90)
MANY_NUMBERS = 4096  # of new keys; four warps spill them
FEW_QUERIES = 2  # up to so many are multiplied out; a matrix unit would compute 16


@triton.jit
def _load_block(source, offsets, is_row, cos, sin, angles, head_dim, BLOCK_D: tl.constexpr):
    """Rows `[r BLOCK_D]` at some offsets, channels (2p, 2p + 1) rotated if there are angles; zeros where there is no row."""
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = is_row[:, None] & (channels < head_dim)
    block = tl.load(source + offsets[:, None] + channels, mask=mask, other=0.0)
    if cos is not None:
        partner = tl.load(source + offsets[:, None] + (channels ^ 1), mask=mask, other=0.0).to(tl.float32)
        cosines = tl.load(cos + angles[:, None] + channels // 2, mask=mask, other=0.0).to(tl.float32)
        sines = tl.load(sin + angles[:, None] + channels // 2, mask=mask, other=0.0).to(tl.float32)
        signed = tl.where(channels % 2 == 0, -partner, partner)
        block = (block.to(tl.float32) * cosines + signed * sines).to(block.dtype)
    return block


@triton.jit
def _product(left, right, WIDENS: tl.constexpr):
    if WIDENS:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="tf32x3")  # of float32; as exact as float32 itself


@triton.jit
def _attend_tile(
    total, largest, weighted, q, k, v, is_seen, scale, USES_DOT: tl.constexpr, WIDENS: tl.constexpr
):
    """One step of the online softmax: sums over the weights and the weighted values so far, relative to `largest`."""
    if USES_DOT:
        logits = _product(q, tl.trans(k), WIDENS)  # [m n]
    else:
        logits = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], axis=2)
    logits = tl.where(is_seen, logits * scale, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, axis=1))
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing seen yet: all weights become 0
    weights = tl.exp2(logits - shift[:, None])
    shrink = tl.exp2(largest - shift)
    total = total * shrink + tl.sum(weights, axis=1)
    if USES_DOT:
        added = _product(weights.to(v.dtype), v, WIDENS)  # [m d]
    else:
        added = tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], axis=1)
    return total, new_largest, weighted * shrink[:, None] + added


@triton.jit
def _attend_kernel(
    q, k, v, keys, values, lengths, ancestors, cos, sin, keep, out, log_totals, scale,
    q_row, q_head, q_new, k_row, k_head, k_new, v_row, v_head, v_new,
    keys_row, keys_head, keys_position, values_row, values_head, values_position,
    lengths_row, ancestors_row, ancestors_query, ancestors_new, angles_row, angles_new, keep_row, keep_position,
    num_rows, num_new, max_length, head_dim,
    NUM_KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_PARTS: tl.constexpr,
    USES_DOT: tl.constexpr, WIDENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (row and key head, tile of queries, part of the stored positions); the last part takes the new ones.

    Writes `out [parts b h t d]` and, of several parts, `log_totals [parts b h t]` (base 2).
    """
    row = (tl.program_id(0) // NUM_KEY_HEADS).to(tl.int64)
    head = (tl.program_id(0) % NUM_KEY_HEADS).to(tl.int64)
    part = tl.program_id(2)
    stored = tl.minimum(tl.load(lengths + row * lengths_row), max_length).to(tl.int32)
    channels = tl.arange(0, BLOCK_D)
    is_channel = channels[None, :] < head_dim

    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # of those that share this key head
    is_query = query < GROUP * num_new
    new_query = query % num_new
    head_query = head * GROUP + query // num_new
    q_offsets = row * q_row + head_query * q_head + new_query * q_new
    angles = row * angles_row + new_query * angles_new
    queries = _load_block(q, q_offsets, is_query, cos, sin, angles, head_dim, BLOCK_D)

    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    keys += row * keys_row + head * keys_head
    values += row * values_row + head * values_head

    per_part = tl.cdiv(tl.cdiv(stored, NUM_PARTS), BLOCK_N) * BLOCK_N
    end = tl.minimum((part + 1) * per_part, stored)
    first = (part * per_part).to(tl.int64)
    key_tile = keys + first * keys_position  # pointers move, so that offsets within a tile stay small
    value_tile = values + first * values_position
    within = tl.arange(0, BLOCK_N)
    key_offsets = within[:, None] * keys_position + channels[None, :]
    value_offsets = within[:, None] * values_position + channels[None, :]
    for start in tl.range(part * per_part, end, BLOCK_N, num_stages=3):
        is_seen = start + within < end
        if keep is not None:
            kept = tl.load(keep + row * keep_row + (start + within) * keep_position, mask=is_seen, other=0)
            is_seen = is_seen & (kept != 0)
        mask = is_seen[:, None] & is_channel  # what is not seen is not read: it may be anything
        old_keys = tl.load(key_tile + key_offsets, mask=mask, other=0.0)
        old_values = tl.load(value_tile + value_offsets, mask=mask, other=0.0)
        total, largest, weighted = _attend_tile(
            total, largest, weighted, queries, old_keys, old_values, is_seen[None, :], scale, USES_DOT, WIDENS
        )
        key_tile += BLOCK_N * keys_position
        value_tile += BLOCK_N * values_position

    if part == NUM_PARTS - 1:
        new = tl.arange(0, BLOCK_T)
        is_new = (new < num_new) & (stored + new < max_length)
        new_angles = row * angles_row + new * angles_new
        k_offsets = row * k_row + head * k_head + new * k_new
        v_offsets = row * v_row + head * v_head + new * v_new
        new_keys = _load_block(k, k_offsets, is_new, cos, sin, new_angles, head_dim, BLOCK_D)
        new_values = _load_block(v, v_offsets, is_new, None, None, new_angles, head_dim, BLOCK_D)
        is_seen = is_query[:, None] & is_new[None, :]
        if ancestors is not None:
            offsets = new_query[:, None] * ancestors_query + new[None, :] * ancestors_new
            is_seen = is_seen & (
                tl.load(ancestors + row * ancestors_row + offsets, mask=is_seen, other=0) != 0
            )
        total, largest, weighted = _attend_tile(
            total, largest, weighted, queries, new_keys, new_values, is_seen, scale, USES_DOT, WIDENS
        )
        if tl.program_id(1) == 0:
            places = (stored + new).to(tl.int64)[:, None]
            mask = is_new[:, None] & is_channel
            tl.store(keys + places * keys_position + channels[None, :], new_keys, mask=mask)
            tl.store(values + places * values_position + channels[None, :], new_values, mask=mask)

    total = tl.where(
        total > 0, total, 1.0
    )  # a query that sees nothing gets zeros, and of its parts no weight
    place = (part.to(tl.int64) * num_rows + row) * NUM_KEY_HEADS * GROUP + head_query
    place = place * num_new + new_query
    places = place[:, None] * head_dim + channels[None, :]
    tl.store(out + places, weighted / total[:, None], mask=is_query[:, None] & is_channel)
    if NUM_PARTS > 1:
        tl.store(log_totals + place, largest + tl.log2(total), mask=is_query)


@triton.jit
def _join_kernel(
    parts, log_totals, out, num_queries, head_dim,
    NUM_PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program of one query: the mean of its parts `[parts q d]`, weighted by what they saw, into `out [q d]`."""
    query = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    channels = tl.arange(0, BLOCK_D)
    places = part.to(tl.int64) * num_queries + query
    logs = tl.load(log_totals + places, mask=part < NUM_PARTS, other=float("-inf"))
    largest = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(largest == float("-inf"), 0.0, largest))
    mask = (part < NUM_PARTS)[:, None] & (channels < head_dim)[None, :]
    means = tl.load(parts + places[:, None] * head_dim + channels[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    mean = tl.sum(weights[:, None] * means, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + query * head_dim + channels, mean, mask=channels < head_dim)


def triton_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None = None,
    rotation: Rotation | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    num_parts: int | None = None,
) -> Tensor:
    """`decode_attention` of tensors that it covers; the stored positions in `num_parts`, by default as many as pay."""
    b, h, t, d = q.shape
    num_key_heads, max_length = keys.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q, k, v = (_with_dense_channels(x) for x in (q, k, v))
    cos, sin = (None, None) if rotation is None else _angles(rotation, b)
    above = None if ancestors is None else ancestors.expand(b, -1, -1).view(torch.uint8)
    kept = None if keep is None else keep.view(torch.uint8)

    group = h // num_key_heads
    blocks = block_sizes(group * t, t, d, keys.element_size())
    grid = (b * num_key_heads, triton.cdiv(group * t, blocks["BLOCK_M"]))
    if num_parts is None:
        num_parts = useful_parts(grid[0] * grid[1], max_length, _num_multiprocessors(q.device))
    parts, log_totals = out, out  # one part is the whole
    if num_parts > 1:
        parts = torch.empty((num_parts, *q.shape), dtype=torch.float32, device=q.device)
        log_totals = torch.empty((num_parts, b, h, t), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _attend_kernel[(*grid, num_parts)](
            q, k, v, keys, values, lengths, above, cos, sin, kept, parts, log_totals,
            (d**-0.5 if scale is None else scale) * math.log2(math.e),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *lengths.stride(),
            *((0, 0, 0) if above is None else above.stride()),
            *((0, 0) if cos is None else (cos.stride(0), cos.stride(2))),
            *((0, 0) if kept is None else kept.stride()),
            b, t, max_length, d,
            NUM_KEY_HEADS=num_key_heads, GROUP=group, NUM_PARTS=num_parts, WIDENS=is_interpreting(), **blocks,
        )  # fmt: skip
        if num_parts > 1:
            _join_kernel[(b * h * t,)](
                parts, log_totals, out, b * h * t, d,
                NUM_PARTS=num_parts, BLOCK_P=triton.next_power_of_2(num_parts), BLOCK_D=blocks["BLOCK_D"], num_warps=1,
            )  # fmt: skip
    return out


def block_sizes(num_queries: int, num_new: int, head_dim: int, element_size: int) -> dict[str, int | bool]:
    """Of the tiles: queries that share a key head, stored and new positions, channels; how they are computed."""
    uses_dot = num_queries > FEW_QUERIES
    smallest = 16 if uses_dot else 1  # what tl.dot takes
    block_d = max(16, triton.next_power_of_2(head_dim))
    largest = max(16, min(TILE_BYTES // (element_size * block_d), 128))
    block_m = min(max(smallest, triton.next_power_of_2(num_queries)), largest)
    block_t = max(smallest, triton.next_power_of_2(num_new))
    return {
        "USES_DOT": uses_dot,
        "BLOCK_M": block_m,
        "BLOCK_N": largest if uses_dot else max(16, largest // block_m),
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "num_warps": 8 if block_t * block_d >= MANY_NUMBERS else 4,
    }


def useful_parts(num_programs: int, max_length: int, num_multiprocessors: int) -> int:
    """In how many parts to read the stored positions, from what is known on the host: twice as many programs as
    multiprocessors, but no part of fewer than `KEYS_PER_PART` when the storage is full."""
    return max(1, min(2 * num_multiprocessors // num_programs, max_length // KEYS_PER_PART, MOST_PARTS))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _with_dense_channels(block: Tensor) -> Tensor:
    return block if block.stride(-1) == 1 else block.contiguous()


def _angles(rotation: Rotation, num_rows: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[b 1 t d/2]` of the same strides, channels beside each other."""
    cos, sin = (_with_dense_channels(x).expand(num_rows, 1, -1, -1) for x in rotation)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())
