"""One module per system, each with `CHECKS: dict[str, Check]` by the kind of golden; see `case.py`."""
