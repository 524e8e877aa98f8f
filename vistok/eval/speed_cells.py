"""What `vistok.eval.speed` measures, one cell at a time, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vistok.eval.speed_floor import Rates
from vistok.eval.speed_ways import PLAIN, PLAIN_DTYPE
from vistok.files import atomic_path


@dataclass(frozen=True, order=True)
class Cell:
    """What is measured at a time."""

    family: str
    way: str
    dtype: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.family}, {self.way}, {self.dtype}, batch {self.batch_size}"


@dataclass(frozen=True)
class Measurement:
    """One cell. Times are of whole batches, `share` included."""

    cell: Cell
    seconds: float  # median, of a batch
    first_seconds: float  # until the first image of a new process is there, with compilation and the like
    floor: float  # least seconds of a batch
    is_memory_bound: bool
    share: int  # a call did one in so many steps; the floor says what the others add
    num_tokens: int  # of an image
    num_passes: int
    bytes_per_pass: float
    flops_per_pass: float
    weights_mib: float
    peak_mib: float | None  # of the first call beyond the weights; None where the system does not tell
    difference: (
        float  # from what the plain way computes in float32: root mean square, over that of the latter
    )
    allowed: float  # the most that it may be

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.cell.batch_size

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds_per_image

    @property
    def over_floor(self) -> float:
        """How many times the floor it takes."""
        return self.seconds / self.floor


@dataclass
class SpeedReport:
    """All measurements with their protocol."""

    rates: Rates
    device: str
    machine: str
    num_threads: int
    vistok: str
    repeats: int = 0
    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # cells in words -> why they are not measured
    protocols: dict[str, str] = field(default_factory=dict)  # family -> what a call does
    parameters: dict[str, int] = field(default_factory=dict)

    def find(self, family: str, way: str, dtype: str, batch_size: int) -> Measurement | None:
        """The measurement of a cell, if there is one."""
        wanted = Cell(family, way, dtype, batch_size)
        return next((one for one in self.measurements if one.cell == wanted), None)

    def plain_of(self, cell: Cell) -> Measurement | None:
        """The plain way of the same family and batch size."""
        return self.find(cell.family, PLAIN, PLAIN_DTYPE, cell.batch_size)


def save(report: SpeedReport, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> SpeedReport | None:
    """The report of an earlier run, if there is one."""
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    measurements = [Measurement(**{**one, "cell": Cell(**one["cell"])}) for one in stored["measurements"]]
    return SpeedReport(**{**stored, "rates": Rates(**stored["rates"]), "measurements": measurements})
