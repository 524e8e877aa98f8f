"""Reading published configuration files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def load_config(path: Path | str) -> dict[str, Any]:
    """A published `.json` or `.yaml` configuration, with its `${...}` references resolved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or YAML, no mapping at the top, or a reference that leads nowhere.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable configuration: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, a configuration is a mapping")
    return resolve(config)


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values that read `${a.b.c}` by the value at that place of the same configuration.

    Raises:
        ValueError: a reference leads nowhere, or round in a circle.
    """
    return _resolve(config, config, ())


def _resolve(value: Any, root: Mapping[str, Any], seen: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolve(item, root, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, seen) for item in value]
    if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
        place = match.group(1)
        if place in seen:
            raise ValueError(f"the configuration refers to itself at ${{{place}}}")
        return _resolve(_look_up(root, place), root, (*seen, place))
    return value


def _look_up(root: Mapping[str, Any], place: str) -> Any:
    node: Any = root
    for name in place.split("."):
        if not isinstance(node, Mapping) or name not in node:
            raise ValueError(f"the configuration refers to ${{{place}}}, which it does not have")
        node = node[name]
    return node
