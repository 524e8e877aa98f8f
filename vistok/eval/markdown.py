"""Tables of reports in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_labels: int = 1) -> list[str]:
    """The lines of a table: the first `num_labels` columns aligned left, the figures after them right."""
    rule = ["---"] * num_labels + ["---:"] * (len(header) - num_labels)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
