"""Renaming the keys of published checkpoints to ours, strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def rename_keys(
    weights: Mapping[str, T], renames: Mapping[str, str], *, ignored: Mapping[str, str] | None = None
) -> dict[str, T]:
    """Published keys -> our keys.

    Args:
        weights: values by published key.
        renames: published prefix -> our prefix; `{i}`, `{j}` stand for numbers. A key is renamed by the first prefix
            that it starts with; a prefix ends with a dot or is the whole key.
        ignored: published keys (the same patterns) that are left out on purpose -> the reason why.

    Returns:
        Values by our key. Keys that no rule knows stay as they are, so that a strict load reports them.

    Raises:
        ValueError: two published keys become one of ours.
    """
    rules = [(_pattern(old), new) for old, new in renames.items()]
    dropped = [_pattern(old) for old in ignored or {}]
    names: dict[str, str] = {}  # our key -> published key
    for key in weights:
        if any(rule.match(key) for rule in dropped):
            continue
        name = _rename(key, rules)
        if name in names:
            raise ValueError(f"the weights hold both {names[name]} and {key}, which mean the same")
        names[name] = key
    return {name: weights[key] for name, key in names.items()}


def _pattern(prefix: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(prefix))
    return re.compile(escaped if prefix.endswith(".") else f"{escaped}$")


def _rename(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for rule, new in rules:
        if match := rule.match(key):
            return new.format(**match.groupdict()) + key[match.end() :]
    return key


def join_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of queries, keys and values (`q_proj`, `k_proj`, `v_proj`) of one layer as one, `qkv_proj`.

    Layers that lack one of them stay as they are, so that a strict load reports them.
    """
    joined = dict(weights)
    for key in weights:
        parts = [key.replace(".q_proj.", f".{name}_proj.") for name in "qkv"]
        if ".q_proj." in key and all(part in joined for part in parts):
            whole = key.replace(".q_proj.", ".qkv_proj.")
            joined[whole] = torch.cat([joined.pop(part) for part in parts])
    return joined


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights`, by our keys, into `model`, whose parameters may be on the meta device.

    Raises:
        ValueError: keys are missing or unexpected, or shapes or kinds of number differ; the message lists them.
    """
    if problems := mismatches(model, weights):
        raise ValueError(f"these weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(dict(weights), strict=True, assign=True)


def mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps `weights` from being the state of `model`, in words; empty when they fit."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    reshaped = [
        f"{key} {list(weights[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    integers = [key for key in expected if key in weights and not weights[key].is_floating_point()]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": reshaped,
        "not floating point": integers,
    }
    return [f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems.items() if keys]


def _some(keys: list[str], limit: int = 8) -> str:
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
