"""Which cells `vistok.eval.speed` measures, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vistok.eval.speed_cells import Cell
from vistok.eval.speed_families import FAMILIES
from vistok.eval.speed_ways import DTYPES, PLAIN, PLAIN_DTYPE, WAYS


@dataclass(frozen=True)
class Selection:
    """Which cells to measure, and how.

    Args:
        families, ways, dtypes, batch_sizes: all combinations; of the plain way only float32.
        repeats: timed calls; the median counts.
        longest: seconds; where a call takes longer, and can be cut, a share of its steps is timed.

    Raises:
        ValueError: something unknown, or a number below 1.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    ways: tuple[str, ...] = (PLAIN, *WAYS)
    dtypes: tuple[str, ...] = DTYPES
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    repeats: int = 3
    longest: float = 30.0

    def __post_init__(self) -> None:
        known = {"families": FAMILIES, "ways": (PLAIN, *WAYS), "dtypes": DTYPES}
        for name, choices in known.items():
            for chosen in getattr(self, name):
                if chosen not in choices:
                    raise ValueError(f"unknown {chosen!r} in {name}; choose from {', '.join(choices)}")
        if self.repeats < 1 or any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"repeats {self.repeats} and batch sizes {self.batch_sizes} must be at least 1")

    def cells(self, family: str) -> list[Cell]:
        """Those of a family in the order in which they are measured: by type, then way, then batch size."""
        return [
            Cell(family, way, dtype, size)
            for dtype in DTYPES
            for way in (PLAIN, *WAYS)
            for size in sorted(self.batch_sizes)
            if way in self.ways and dtype in ((PLAIN_DTYPE,) if way == PLAIN else self.dtypes)
        ]


ONE, EAGER = (1,), (PLAIN, "eager")
FLEXTOK = ("flextok-d12-d12", "flextok-d12-d12-32-tokens")
PRESETS = {  # for a CPU of two cores; the last selection is about all families that are not in those before
    # About twenty minutes; FlexTok takes six of them, LlamaGen-B three, compiling NAR two.
    "default": (
        Selection(("llamagen-b",), EAGER, DTYPES, ONE, repeats=2, longest=7.0),
        Selection(("llamagen-b",), ("compiled",), ("bfloat16", "int8"), ONE, repeats=2, longest=7.0),
        Selection(("nar-b",), (*EAGER, "compiled"), ("bfloat16",), ONE, repeats=3, longest=7.0),
        # Whole calls: the plain way has more to do in every step than the floor, by which a share would be scaled.
        Selection(FLEXTOK, EAGER, ("float32",), ONE, repeats=1, longest=300.0),
        Selection(ways=EAGER, dtypes=("bfloat16",), batch_sizes=ONE, repeats=1, longest=1.5),
    ),
    # Less than two minutes.
    "quick": (
        Selection(("llamagen-b",), (*EAGER, "compiled"), ("bfloat16",), ONE, repeats=1, longest=1.0),
        Selection(("nar-b",), EAGER, ("bfloat16",), ONE, repeats=1, longest=1.0),
    ),
    # Hours.
    "full": (Selection(),),
}


def choose(preset: str, **given: Any) -> list[Selection]:
    """The selections of a preset, with what is given instead of theirs; `None` is not given.

    Families that are given are measured as the first selection with them says, and all others as the last.

    Raises:
        ValueError: an unknown preset, or see `Selection`.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    changes = {name: value for name, value in given.items() if value is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    *special, general = PRESETS[preset]
    chosen = []
    for selection in special:
        wanted = changes.get("families", selection.families)
        families = tuple(family for family in selection.families if family in wanted)
        chosen.append(replace(selection, **{**changes, "families": families}))
    return [*chosen, replace(general, **changes)]
