"""Continuous batching for serving: requests join a batch of running images as slots become free, and leave it when done.

Yu et al. 2022 (Orca), section 3.1, call it iteration-level scheduling. A batch has a fixed number of rows, each at a step
of its own; a request waits only until enough of them are free, and not until all images of a batch are done.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Iterator

import torch

from vistok.decoding.serving.request import Job, QueueFullError, Request, Ticket, make_job
from vistok.decoding.serving.slots import Feed, Slots
from vistok.models.generators.base import Generator, NextTokenGenerator
from vistok.tokens import Tokens

IDLE_SECONDS = 0.05  # how soon `serve` sees that it should stop

logger = logging.getLogger(__name__)


class Server:
    """Draws images as they are asked for, with one next-token generator.

    A request's tokens are those that `generate_ordered` draws for it alone with the same seed, whoever joins or leaves
    meanwhile. Only rounding differs between few rows and many, which in low precision may tip a draw.

    Every image is at one token per step. So generators that decide several positions at a step (NAR, whose diagonals
    differ in size from step to step, xAR) and masked ones, which have no cache, are not served: their batches are
    short; draw them with a pipeline.

    `submit` and `Ticket.cancel` may be called from any thread, while another one is in `step`, `run` or `serve`.

    Args:
        model: a next-token generator in evaluation mode, which is not moved or changed meanwhile.
        num_slots: rows of the batch. A guided request takes two, until the last of its tokens that is guided.
        num_tokens: the most that a request may ask for; all of an image by default.
        max_waiting: requests that may wait; `None`: any number.
        feed: computes a step instead of `model.feed`, such as that of a `CompiledGenerator`. It sees the first 1, 2, 4,
            8, ... rows of one cache that is kept, and so as many kinds of arguments.

    Raises:
        ValueError: a generator of another kind, or a number outside its range.
    """

    def __init__(
        self,
        model: Generator,
        *,
        num_slots: int = 16,
        num_tokens: int | None = None,
        max_waiting: int | None = 1024,
        feed: Feed | None = None,
    ) -> None:
        if not isinstance(model, NextTokenGenerator):
            raise ValueError(
                f"{type(model).__name__} does not decide one token after the other, which continuous batching needs: "
                "draw its images in batches, with a pipeline"
            )
        num_tokens = model.num_tokens if num_tokens is None else num_tokens
        if not 1 <= num_tokens <= model.num_tokens:
            raise ValueError(f"num_tokens must be in 1..{model.num_tokens}, got {num_tokens}")
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}; guided requests need 2")
        if max_waiting is not None and max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, or None for any number; got {max_waiting}")
        self.model = model
        self.num_slots, self.num_tokens, self.max_waiting = num_slots, num_tokens, max_waiting
        self._ids = itertools.count()
        self._feed: Feed = model.feed if feed is None else feed
        self._slots = self._new_slots()
        self._waiting: list[tuple[int, int, Job]] = []  # a heap by priority and number
        self._admitted: dict[int, Ticket] = {}
        self._changed = threading.Condition()  # guards the three above
        self._stepping = threading.Lock()

    @property
    def num_waiting(self) -> int:
        """Requests without slots."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with slots."""
        return len(self._admitted)

    def submit(self, request: Request) -> Ticket:
        """Ask for an image.

        Raises:
            ValueError: a condition of another kind or not one row, settings outside their range, or more slots needed
                than there are.
            QueueFullError: `max_waiting` requests wait already.
        """
        ticket = Ticket(next(self._ids), request)
        job = make_job(self.model, ticket, self.num_tokens)
        if job.num_rows > self.num_slots:
            raise ValueError(
                f"a guided request takes {job.num_rows} slots, this server has {self.num_slots}: raise num_slots"
            )
        with self._changed:
            self._check_queue()
            heapq.heappush(self._waiting, (request.priority, ticket.request_id, job))
            self._changed.notify_all()
        return ticket

    @torch.no_grad()
    def step(self) -> list[Ticket]:
        """Let waiting requests join, draw a token of every image, two of those that have joined.

        Returns:
            The requests that this step ended, by a result or an exception. Cancelled ones are not among them.

        Raises:
            Exception: what the model raised. All running requests fail with it; the next step begins with new slots.
        """
        with self._stepping:
            try:
                return self._step()
            except BaseException as error:
                for ticket in list(self._admitted.values()):
                    self._resolve(ticket, error)
                self._slots = self._new_slots()
                raise

    def run(self) -> Iterator[Ticket]:
        """Step until no request is left, and give each as it ends; `ticket.result()` are its tokens."""
        while self.num_waiting or self.num_running:
            yield from self.step()

    def serve(self, stop: threading.Event) -> None:
        """Step until `stop` is set, for a thread of its own; requests that are left then stay as they are.

        What the model raises is logged, and fails the requests that ran.
        """
        while not stop.is_set():
            with self._changed:
                if not self._waiting and not self._admitted:
                    self._changed.wait(IDLE_SECONDS)
                    continue
            try:
                self.step()
            except Exception:
                logger.exception("a step failed, and with it all images that were being drawn")

    def _new_slots(self) -> Slots:
        return Slots(self.model, self.num_slots, self.num_tokens, self._feed)

    def _check_queue(self) -> None:
        if self.max_waiting is None or len(self._waiting) < self.max_waiting:
            return
        entries, self._waiting = self._waiting, []
        for entry in entries:
            if (ticket := entry[2].ticket).cancelled():
                ticket.set_running_or_notify_cancel()
            else:
                heapq.heappush(self._waiting, entry)
        if len(self._waiting) >= self.max_waiting:
            raise QueueFullError(
                f"{self.max_waiting} requests wait already: try again later, or raise max_waiting"
            )

    def _step(self) -> list[Ticket]:
        for seat in list(self._slots.seats):
            if seat.job.ticket.cancelled():
                self._slots.leave(seat)
                self._forget(seat.job.ticket)
                seat.job.ticket.set_running_or_notify_cancel()
        ended = self._join(self._admit())
        if not all(seat.is_done for seat in self._slots.seats):
            self._slots.step()
        return ended + self._collect()

    def _admit(self) -> list[Job]:
        """The next requests, as many as there is room for; none overtakes another that needs more of it."""
        jobs, room = [], self._slots.num_free
        with self._changed:
            while self._waiting:
                job = self._waiting[0][2]
                is_cancelled = job.ticket.cancelled()
                if not is_cancelled and job.num_rows > room:
                    break
                heapq.heappop(self._waiting)
                if is_cancelled:
                    job.ticket.set_running_or_notify_cancel()  # for who waits for several
                else:
                    room -= job.num_rows
                    jobs.append(job)
                    self._admitted[job.ticket.request_id] = job.ticket
        return jobs

    def _join(self, jobs: list[Job]) -> list[Ticket]:
        """Give requests their slots; returns those whose condition cannot be read, which must not harm the others."""
        if not jobs:
            return []
        try:
            self._slots.join(jobs)
        except (ValueError, IndexError) as error:
            if len(jobs) == 1:
                return self._resolve(jobs[0].ticket, error)
            return [ticket for job in jobs for ticket in self._join([job])]
        return []

    def _collect(self) -> list[Ticket]:
        """Let those leave that are done."""
        ended = []
        for seat in [seat for seat in self._slots.seats if seat.is_done]:
            self._slots.leave(seat)
            try:
                ended += self._resolve(seat.job.ticket, self._slots.tokens(seat))
            except FloatingPointError as error:
                ended += self._resolve(seat.job.ticket, error)
        return ended

    def _resolve(self, ticket: Ticket, result: Tokens | BaseException) -> list[Ticket]:
        """End a request; returns it, unless it was cancelled."""
        self._forget(ticket)
        if not ticket.set_running_or_notify_cancel():
            return []
        if isinstance(result, BaseException):
            ticket.set_exception(result)
        else:
            ticket.set_result(result)
        return [ticket]

    def _forget(self, ticket: Ticket) -> None:
        with self._changed:
            self._admitted.pop(ticket.request_id, None)
