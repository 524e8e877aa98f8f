"""A golden (recorded weights, inputs and outputs of a published system) and what comparing with it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ATOL = 1e-4  # float32 on one CPU against another: only the order of additions differs


@dataclass(frozen=True)
class GoldenCase:
    """One golden: `<name>.json` beside `<name>.safetensors`."""

    name: str
    system: str
    kind: str
    config: dict[str, Any]  # the constructor arguments, in the published names
    weights: dict[str, Tensor]  # by published key
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    intermediate: dict[str, Tensor]
    meta: dict[str, Any]  # the whole JSON

    @property
    def expected(self) -> dict[str, Tensor]:
        """Everything that has to be reproduced, as `outputs/<name>` and `intermediate/<name>`."""
        outputs = {f"outputs/{name}": tensor for name, tensor in self.outputs.items()}
        return outputs | {f"intermediate/{name}": tensor for name, tensor in self.intermediate.items()}

    @classmethod
    def read(cls, path: Path) -> GoldenCase:
        """The golden at `path`, with or without a suffix.

        Raises:
            FileNotFoundError: the JSON or the safetensors file is missing.
            ValueError: the JSON says no system, kind or config, or a tensor lies in no known group.
        """
        meta = read_meta(path)
        groups: dict[str, dict[str, Tensor]] = {
            "weights": {},
            "inputs": {},
            "outputs": {},
            "intermediate": {},
        }
        for key, tensor in load_file(path.with_suffix(".safetensors")).items():
            group, _, name = key.partition("/")
            if group not in groups or not name:
                raise ValueError(f"{path}: tensor {key!r} is in none of {', '.join(groups)}")
            groups[group][name] = tensor
        fields = {name: meta[name] for name in ("system", "kind", "config")}
        return cls(name=path.stem, meta=meta, **fields, **groups)


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON of a golden, without its tensors; raises as `GoldenCase.read` does."""
    meta = json.loads(path.with_suffix(".json").read_text())
    if missing := [name for name in ("system", "kind", "config") if name not in meta]:
        raise ValueError(f"{path.with_suffix('.json')} lacks {', '.join(missing)}")
    return meta


@dataclass
class Comparison:
    """Collects named differences; a check fills it and returns it.

    Name what you compare after the golden's tensor (`outputs/reconstruction`): tensors nobody compared are failures.
    """

    errors: dict[str, float] = field(default_factory=dict)  # largest absolute error of each float tensor
    equal: dict[str, bool] = field(default_factory=dict)  # whether each integer tensor agrees
    failures: list[str] = field(default_factory=list)  # one sentence for everything that disagrees

    def compare(self, name: str, actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
        """Integers and booleans must agree exactly, floats within `atol`, shapes always."""
        actual, expected = actual.detach().cpu(), expected.cpu()
        if actual.shape != expected.shape:
            self._fail_shape(name, actual, expected)
        elif expected.is_floating_point():
            self._compare_floats(name, actual, expected, atol)
        else:
            self.equal[name] = torch.equal(actual, expected)
            if not self.equal[name]:
                count = int((actual != expected).sum())
                self.failures.append(f"{name}: {count} of {expected.numel()} integers differ")

    def _compare_floats(self, name: str, actual: Tensor, expected: Tensor, atol: float) -> None:
        actual, expected = actual.double(), expected.double()
        error = torch.where(actual == expected, 0.0, (actual - expected).abs())  # equal infinities agree
        worst = float(error.max()) if error.numel() else 0.0
        self.errors[name] = worst if worst == worst else float("inf")
        if not self.errors[name] <= atol:
            self.failures.append(f"{name}: off by {self.errors[name]:.2e}, more than {atol:.0e}")

    def _fail_shape(self, name: str, actual: Tensor, expected: Tensor) -> None:
        if expected.is_floating_point():
            self.errors[name] = float("inf")
        else:
            self.equal[name] = False
        self.failures.append(f"{name}: shape {list(actual.shape)}, the golden has {list(expected.shape)}")

    @property
    def names(self) -> set[str]:
        """Everything compared so far."""
        return {*self.errors, *self.equal}


Check = Callable[[GoldenCase], Comparison]
