"""One family under measurement: that a way computes what the plain loop does, and then how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.eval.peak_memory import MIB, peak_memory
from vistok.eval.speed_cells import Cell, Measurement
from vistok.eval.speed_families import build_subject
from vistok.eval.speed_floor import Rates, floor_seconds, is_bound_by_memory
from vistok.eval.speed_subjects import Subject
from vistok.eval.speed_ways import PLAIN, PLAIN_DTYPE, WAYS, convert, drawn_with
from vistok.eval.speed_work import mean_of
from vistok.eval.timing import median_seconds
from vistok.models.quantize import stored_bytes


class ParityError(ValueError):
    """A way does not compute what the plain loop computes."""


@dataclass(frozen=True)
class Prepared:
    """A way that computes what it should.

    Args:
        model: what `Subject.draw` takes.
        made: what `finish` takes.
        difference: how far its outputs are off.
        start: seconds that the first evaluation for one image took more than the second.
    """

    model: Any
    made: Any = None
    difference: float = 0.0
    start: float = 0.0


class Bench:
    """One family in one run; its cells are asked for by type, in the order of `DTYPES`.

    Args:
        family: name.
        rates: of the device.
        device: where.
    """

    def __init__(self, family: str, rates: Rates, device: torch.device) -> None:
        self.family = family
        self.rates = rates
        self.device = device
        self.subject: Subject = build_subject(family)
        self.subject.model.to(device)
        self.reference = self.subject.plain_outputs()  # of float32
        self.subject.passes(1, 1)  # what has to be counted, is counted in float32
        self.dtype, self.budget = PLAIN_DTYPE, self.subject.tolerance
        self.shares: dict[tuple[str, int], int] = {}  # (type, batch size) -> share of the steps that is timed

    def convert(self, dtype: str) -> None:
        """From now on in another type; what the plain loop is off in it, twice, is what a way may be off."""
        if dtype == self.dtype:
            return
        convert(self.subject, dtype)
        self.dtype = dtype
        self.budget = self.subject.tolerance + 2 * self._difference(self.subject.plain_outputs())

    def prepare(self, way: str) -> Prepared:
        """A way in the present type, checked against the plain loop.

        Raises:
            UnavailableError: the family has no such way.
            ParityError: it computes something else.
        """
        if way == PLAIN:
            return Prepared(None)
        made = WAYS[way](self.subject)
        model = drawn_with(self.subject, made)
        outputs: list[Tensor] = []
        first, second = (self._seconds(lambda: outputs.append(self.subject.outputs(model))) for _ in range(2))
        difference = self._difference(outputs[0])
        if not difference <= self.budget:
            raise ParityError(
                f"{self.family}, {way}, {self.dtype}: what it computes is off by {difference:.3g} of what the plain loop "
                f"computes in float32, more than {self.budget:.3g}; nothing is timed that computes something else"
            )
        return Prepared(model, made, difference, max(0.0, first - second))

    def _difference(self, outputs: Tensor) -> float:
        error, size = (x.double().square().mean().sqrt() for x in (outputs - self.reference, self.reference))
        return (error / size).item()

    def measure(self, cell: Cell, prepared: Prepared, *, repeats: int, longest: float) -> Measurement:
        """Time a cell of a way that is prepared."""
        subject, size = self.subject, cell.batch_size

        def call(share: int) -> Any:
            return (
                subject.draw_plain(size, share)
                if cell.way == PLAIN
                else subject.draw(prepared.model, size, share)
            )

        share, cold = self._choose_share(call, cell, longest)
        start = prepared.start if size == 1 else 0.0
        starts: list[float] = []
        peak = peak_memory(lambda: starts.append(self._seconds(lambda: call(share))), self.device)
        if peak is not None and self.device.type == "cpu":  # what nothing is written to yet, is not resident
            peak += (subject.state_bytes(size, 1) - subject.state_bytes(size, share)) / MIB
        (seconds,) = median_seconds([lambda: call(share)], repeats, self.device)
        passes = subject.passes(size, 1)
        whole = seconds * self._floor(size, 1) / self._floor(size, share)
        return Measurement(
            cell=cell,
            seconds=whole,
            first_seconds=whole + max(start, cold, starts[0] - seconds),
            floor=self._floor(size, 1),
            is_memory_bound=is_bound_by_memory(passes, self.rates, self.dtype),
            share=share,
            num_tokens=subject.num_tokens,
            num_passes=sum(one.count for one in passes),
            bytes_per_pass=mean_of(passes, "bytes"),
            flops_per_pass=mean_of(passes, "flops"),
            weights_mib=stored_bytes(subject.model) / MIB,
            peak_mib=peak,
            difference=prepared.difference,
            allowed=self.budget,
        )

    def _choose_share(self, call: Callable[[int], Any], cell: Cell, longest: float) -> tuple[int, float]:
        """The largest share of the steps that takes no longer; and what the first call takes more than the second.

        All ways of one type and batch size but the plain one have the share of the first.
        """
        shares, key = self.subject.shares, (cell.dtype, cell.batch_size)
        if len(shares) == 1:
            return shares[0], 0.0
        if key in self.shares and cell.way != PLAIN:
            return self.shares[key], 0.0
        cold, warm = (self._seconds(lambda: call(shares[-1])) for _ in range(2))
        pace = warm / self._floor(cell.batch_size, shares[-1])
        fitting = [share for share in shares if pace * self._floor(cell.batch_size, share) <= longest]
        chosen = (fitting or [shares[-1]])[0]
        if cell.way != PLAIN:
            self.shares[key] = chosen
        return chosen, max(0.0, cold - warm)

    def _seconds(self, call: Callable[[], Any]) -> float:
        return median_seconds([call], 1, self.device)[0]

    def _floor(self, size: int, share: int) -> float:
        passes = self.subject.passes(size, share)
        return floor_seconds(passes, self.rates, self.dtype)
