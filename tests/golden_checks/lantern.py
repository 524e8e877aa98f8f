"""Goldens of LANTERN: each `lantern_<part>.py` beside this file has the `CHECKS` of its kinds."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests import golden_checks
from tests.golden_checks.case import Check

CHECKS: dict[str, Check] = {}
for part in iter_modules(golden_checks.__path__):
    if part.name.startswith("lantern_"):
        CHECKS |= import_module(f"{golden_checks.__name__}.{part.name}").CHECKS
