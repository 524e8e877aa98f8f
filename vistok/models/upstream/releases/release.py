"""What is known about a published checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HUB_FILES = ("model.safetensors", "config.json")
CODE_LICENCE = (
    "MIT (code)"  # where we know the licence of the code only, not what the weights' repository says
)


@dataclass(frozen=True)
class Release:
    """One published checkpoint."""

    name: str
    system: str  # of `upstream.SYSTEMS`
    hub_id: str
    files: tuple[str, ...]  # weights, then the configuration if there is one
    params: int
    size_mb: int | None  # of the weights file, in units of 10^6 bytes; None: not published
    config: Mapping[str, Any] | None  # for `upstream.load`; None: only the second of `files` tells it
    licence: str = "Apache-2.0"
    metrics: Mapping[str, float] = field(default_factory=dict)  # as published; not measured by us
    sampling: Mapping[str, Any] | None = (
        None  # published settings of a generator, in the published names and scales
    )
    tokenizer: str | None = None  # name of the release whose tokens a generator makes
    is_config_in_file: bool = False  # the weights file carries the whole configuration; `config` tells shapes

    def complete_config(self) -> Mapping[str, Any]:
        """`config`, where that is enough to load weights whose file carries none.

        Raises:
            ValueError: it is not.
        """
        if self.config is None:
            raise ValueError(
                f"weights of {self.name} need their official {self.files[1]}: put it beside them and name the folder, or "
                "pass it to `vistok convert`"
            )
        if self.is_config_in_file:
            raise ValueError(
                f"weights of {self.name} need the configuration that their official file carries in its header, and this "
                "file does not: put the official config.json beside it and name the folder, or pass it to `vistok convert`"
            )
        return self.config
