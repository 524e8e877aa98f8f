"""The slots of a batch that never ends: every row of the model is at a step of its own."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vistok.decoding.sampling import SamplingParams
from vistok.decoding.serving.request import Job
from vistok.kernels.sampling import sample_tokens
from vistok.models.generators.base import NextTokenGenerator, join_conditions
from vistok.models.layers.kv_cache import KVCache
from vistok.tokens import Tokens

Feed = Callable[[Tensor, KVCache], tuple[Tensor, ...]]


@dataclass
class Seat:
    """A request while it is drawn.

    Attributes:
        job: the request.
        row: its slot.
        null_row: the slot of its unconditional branch; `None` once no token is guided any more.
        num_drawn: tokens so far.
    """

    job: Job
    row: int
    null_row: int | None
    num_drawn: int = 0

    @property
    def is_done(self) -> bool:
        """Whether all tokens are drawn."""
        return self.num_drawn == self.job.num_tokens

    @property
    def rows(self) -> list[int]:
        """All of its slots."""
        return [self.row] if self.null_row is None else [self.row, self.null_row]


@dataclass(frozen=True)
class Draws:
    """Slots whose tokens are drawn in one go.

    Args:
        sampling: how.
        rows: `[g]` int64.
        null_rows: `[g]`, of their unconditional branches; `None` where there is no guidance.
    """

    sampling: SamplingParams
    rows: Tensor
    null_rows: Tensor | None


class Slots:
    """Rows of one model, each of which is free or belongs to a request.

    A step reads the first 1, 2, 4, 8, ... rows, as many as it takes to reach all requests, so that few shapes occur; what
    comes of a free row is not used. What a step needs to know, positions, scales and uniforms, was put on the device
    when a request joined, and a step leaves its tokens there, so that nothing waits for the device until a request
    leaves.

    Args:
        model: a next-token generator.
        num_slots: rows.
        num_tokens: room for so many tokens of an image.
        feed: computes a step, as `model.feed` does.
    """

    def __init__(self, model: NextTokenGenerator, num_slots: int, num_tokens: int, feed: Feed) -> None:
        device = model.device
        self.model, self._feed = model, feed
        self.seats: list[Seat] = []
        self.num_tokens = num_tokens
        self._free = list(range(num_slots))  # a heap: requests stay in front
        self._cache: KVCache | None = None  # from the first request on
        self._views: dict[int, KVCache] = {}  # the first rows of the cache, by their number
        self._indices = torch.zeros(num_slots, num_tokens, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(num_slots, num_tokens, device=device)
        self._scales = torch.ones(num_slots, num_tokens, device=device)
        self._last = torch.zeros(num_slots, dtype=torch.int64, device=device)  # tokens not read yet
        self._num_drawn = torch.zeros_like(self._last)
        self._is_open = torch.zeros_like(self._last)  # 1: the row goes on
        self._draws: list[Draws] = []

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return len(self._free)

    def join(self, jobs: list[Job]) -> None:
        """Read the conditions of some requests, together, give them slots and draw their first tokens.

        Raises:
            ValueError, IndexError: the model cannot read one of them; nothing has changed then.
        """
        nulls = [job.null for job in jobs if job.null is not None]
        rows = functools.reduce(join_conditions, [*(job.ticket.request.condition for job in jobs), *nulls])
        source = self.model.new_cache(len(rows), 1)
        first = self.model.prefill(rows.to(self.model.device), source)[:, -1]  # [r v]
        taken = [heapq.heappop(self._free) for _ in range(len(rows))]
        slots = self._tensor(taken)
        self._put(slots, source)
        null_rows = iter(taken[len(jobs) :])
        joined = [
            Seat(job, row, None if job.null is None else next(null_rows))
            for job, row in zip(jobs, taken, strict=False)
        ]
        for seat in joined:
            self._write_plan(seat)
        self._num_drawn[slots] = 0
        logits = first.new_zeros(len(self._last), first.shape[1]).index_copy(0, slots, first)
        self._draw(logits, self._group(joined))
        self._advance_seats(joined)
        self.seats += joined
        self._regroup()

    def step(self) -> None:
        """Read the token that was drawn last of every request, and draw the next one of those that are not done."""
        num_rows = self._num_read()
        cache = self._first_rows(num_rows)
        (logits,) = self._feed(self._last[:num_rows, None], cache)  # [n 1 v]
        cache.advance_rows(self._is_open[:num_rows])
        self._draw(logits[:, 0], self._draws)
        is_same = self._advance_seats([seat for seat in self.seats if not seat.is_done])
        if not is_same:
            self._regroup()

    def leave(self, seat: Seat) -> None:
        """Free the slots of a request."""
        self.seats.remove(seat)
        self._release(*seat.rows)
        self._regroup()

    def tokens(self, seat: Seat) -> Tokens:
        """Those of a request that is done; this waits for the device.

        Raises:
            FloatingPointError: the logits of a token were no distribution.
        """
        indices = self._indices[seat.row : seat.row + 1, : seat.job.num_tokens].clone()  # [1 n]
        broken = (indices[0] < 0).nonzero()
        if len(broken):
            raise FloatingPointError(
                f"request {seat.job.ticket.request_id}: the logits of token {int(broken[0])} of "
                f"{seat.job.num_tokens}, counted from 0, are no distribution: NaN, +inf, or nothing finite. Look at the "
                "condition and the weights; with float16, try bfloat16"
            )
        return Tokens(indices=indices, codebook_size=self.model.codebook_size, layout=self.model.layout)

    def _put(self, slots: Tensor, source: KVCache) -> None:
        """Copy what was read of new requests into their slots; at first into all, so that free ones hold something."""
        rows = torch.arange(len(slots), device=slots.device)
        if self._cache is None:
            self._cache = self.model.new_cache(len(self._last), self.num_tokens)
            self._cache.split_rows(can_grow=False)
            self._cache.put_rows(
                torch.arange(len(self._last), device=slots.device), source, rows[:1].expand(len(self._last))
            )
        stored = self._cache.tensors()
        self._cache.put_rows(slots, source, rows)
        if any(new is not old for new, old in zip(self._cache.tensors(), stored, strict=True)):
            self._views.clear()  # a text that is longer than all before took new storage

    def _num_read(self) -> int:
        """Rows up to the last that belongs to a request, rounded up to a power of 2 where there are so many."""
        last = max(max(seat.rows) for seat in self.seats)
        return min(len(self._last), 1 << last.bit_length())

    def _first_rows(self, count: int) -> KVCache:
        assert self._cache is not None
        if count not in self._views:
            self._views[count] = self._cache.narrow(count)
        return self._views[count]

    def _release(self, *rows: int) -> None:
        for row in rows:
            heapq.heappush(self._free, row)

    def _write_plan(self, seat: Seat) -> None:
        """All draws and scales of a request, so that no step has to bring them."""
        num_tokens = seat.job.num_tokens
        self._uniforms[seat.row, :num_tokens] = seat.job.uniforms.to(self._uniforms.device)
        self._scales[seat.row, :num_tokens] = torch.tensor(seat.job.scales, device=self._scales.device)

    def _draw(self, logits: Tensor, draws: list[Draws]) -> None:
        """Draw the next token of some slots from logits `[s v]`, whose rows are those of the slots."""
        for some in draws:
            rows, place = some.rows, self._num_drawn[some.rows]  # [g] each
            read = rows if some.null_rows is None else torch.cat([rows, some.null_rows])
            drawn = sample_tokens(
                logits[read][:, None],
                self._uniforms[rows, place][:, None],
                **asdict(some.sampling),
                guidance_scale=1.0 if some.null_rows is None else self._scales[rows, place][:, None, None],
            )[:, 0]  # [g], -1 where the logits are no distribution
            self._indices[rows, place] = drawn
            self._last[read] = drawn.clamp_min(0).repeat(len(read) // len(rows))
            self._num_drawn[rows] = place + 1

    def _advance_seats(self, seats: list[Seat]) -> bool:
        """Count a token of each; returns whether all of them go on as they were."""
        is_same = True
        for seat in seats:
            seat.num_drawn += 1
            if seat.null_row is not None and seat.num_drawn >= seat.job.num_guided:
                self._release(seat.null_row)
                seat.null_row, is_same = None, False
            is_same = is_same and not seat.is_done
        return is_same

    def _regroup(self) -> None:
        """Say again which rows go on, after any of them began or ended."""
        going = [seat for seat in self.seats if not seat.is_done]
        self._draws = self._group(going)
        rows = self._tensor([row for seat in going for row in seat.rows])
        self._is_open.zero_().index_fill_(0, rows, 1)

    def _group(self, seats: list[Seat]) -> list[Draws]:
        """Seats with the same sampling, guided and not."""
        groups: dict[tuple[SamplingParams, bool], list[Seat]] = {}
        for seat in seats:
            groups.setdefault((seat.job.ticket.request.sampling, seat.null_row is None), []).append(seat)
        return [
            Draws(
                sampling,
                self._tensor([seat.row for seat in group]),
                None if is_plain else self._tensor([seat.rows[1] for seat in group]),
            )
            for (sampling, is_plain), group in groups.items()
        ]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._last.device)
