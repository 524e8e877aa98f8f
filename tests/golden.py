"""Compare our models with recorded results of the published ones.

    python -m tests.golden FILE_OR_DIR...

Prints one line per golden, `PASS|FAIL|UNSUPPORTED name max_abs_error ids_equal`; reasons go to stderr. Exits with 0 if
all pass. Folders are searched for pairs of `.json` and `.safetensors`; lists of keys (`manifest-*.json`) are skipped.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tests.golden_checks.case import Check, Comparison, GoldenCase, read_meta


@dataclass(frozen=True)
class Verdict:
    """What became of one golden."""

    name: str
    status: str  # PASS, FAIL or UNSUPPORTED
    max_abs_error: float | None = None  # over all float tensors; None if none was compared
    ids_equal: bool | None = None  # over all integer tensors; None if none was compared
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        error = "-" if self.max_abs_error is None else f"{self.max_abs_error:.2e}"
        ids = {True: "yes", False: "no", None: "-"}[self.ids_equal]
        return f"{self.status} {self.name} {error} {ids}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every golden named on the command line; 0 if all pass, 1 if not, 2 if there is nothing to check."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Check goldens.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_DIR")
    goldens, missing = find_goldens(parser.parse_args(arguments).paths)
    for path in missing:
        print(f"{path}: no golden there", file=sys.stderr)
    verdicts = [check_golden(path) for path in goldens]
    if missing or not verdicts:
        return 2
    return 0 if all(verdict.status == "PASS" for verdict in verdicts) else 1


def find_goldens(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Paths of the goldens' JSON files, sorted, each once; and the given paths where there is none."""
    found: dict[Path, None] = {}
    missing = []
    for path in paths:
        files = _candidates(path)
        found |= dict.fromkeys(files)
        if not files:
            missing.append(path)
    return list(found), missing


def _candidates(path: Path) -> list[Path]:
    if path.is_dir():
        names = {
            file.with_suffix("") for suffix in ("json", "safetensors") for file in path.rglob(f"*.{suffix}")
        }
        return [name.with_suffix(".json") for name in sorted(names) if _is_golden(name)]
    return [path.with_suffix(".json")] if path.is_file() else []


def _is_golden(name: Path) -> bool:
    """Whether a name in a folder is a golden: not a manifest, nor a lone JSON or safetensors file of another kind."""
    if name.name.startswith("manifest-"):
        return False
    if not name.with_suffix(".json").is_file():
        return _holds_outputs(name.with_suffix(".safetensors"))
    if name.with_suffix(".safetensors").is_file():
        return True
    try:
        read_meta(name)
    except (ValueError, TypeError):
        return False
    return True


def _holds_outputs(path: Path) -> bool:
    """Whether a safetensors file is a golden's, or damaged, so that it might be one."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("outputs/") for key in file.keys())  # noqa: SIM118
    except SafetensorError:
        return True


def check_golden(path: Path) -> Verdict:
    """Run one golden and print its line; whatever goes wrong is a verdict, not an exception."""
    try:
        verdict = _check(path)
    except Exception as error:
        traceback.print_exc(limit=-3)
        verdict = Verdict(path.stem, "FAIL", reasons=(f"{type(error).__name__}: {error}",))
    for reason in verdict.reasons:
        print(f"{verdict.name}: {reason}", file=sys.stderr)
    print(verdict, flush=True)
    return verdict


def _check(path: Path) -> Verdict:
    meta = read_meta(path)
    check = find_check(meta["system"], meta["kind"])
    if check is None:
        reason = f"nothing checks system {meta['system']!r}, kind {meta['kind']!r}"
        return Verdict(path.stem, "UNSUPPORTED", reasons=(reason,))
    case = GoldenCase.read(path)
    if not case.expected:
        return Verdict(path.stem, "FAIL", reasons=("the golden holds no outputs",))
    return _judge(case, check(case))


def _judge(case: GoldenCase, comparison: Comparison) -> Verdict:
    uncompared = sorted(set(case.expected) - comparison.names)
    reasons = [*comparison.failures, *(f"{name} was not compared" for name in uncompared)]
    return Verdict(
        case.name,
        "FAIL" if reasons else "PASS",
        max_abs_error=max(comparison.errors.values(), default=None),
        ids_equal=all(comparison.equal.values()) if comparison.equal else None,
        reasons=tuple(reasons),
    )


def find_check(system: str, kind: str) -> Check | None:
    """The check of a kind of golden, from `tests/golden_checks/<system>.py`; `None` if there is none."""
    module = f"tests.golden_checks.{system}"
    if not str(system).isidentifier() or find_spec(module) is None:
        return None
    return getattr(import_module(module), "CHECKS", {}).get(kind)


if __name__ == "__main__":
    sys.exit(main())
