"""The small models that ship with the package: one folder each, as a pipeline's `save_pretrained` leaves it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ZOO = Path(__file__).parent


@dataclass(frozen=True)
class ShippedModel:
    """A shipped pipeline, or one part of it."""

    name: str
    folder: Path
    class_name: str
    facts: dict[str, Any]  # description, licence and measured metrics, from the pipeline's facts.json

    @property
    def size_mb(self) -> float:
        """Size of the weights in units of 10^6 bytes."""
        return sum(file.stat().st_size for file in self.folder.rglob("*.safetensors")) / 1e6


def shipped() -> dict[str, ShippedModel]:
    """All shipped models by name: `emoji-64` is a pipeline, `emoji-64/tokenizer` the tokenizer inside it."""
    found = {}
    for index in sorted(ZOO.glob("*/model_index.json")):
        folder, pipeline_class = index.parent, json.loads(index.read_text())["_class_name"]
        facts_file = folder / "facts.json"
        facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
        found[folder.name] = ShippedModel(folder.name, folder, pipeline_class, facts)
        for config in sorted(folder.glob("*/config.json")):
            name = f"{folder.name}/{config.parent.name}"
            found[name] = ShippedModel(
                name, config.parent, json.loads(config.read_text())["_class_name"], facts
            )
    return found
