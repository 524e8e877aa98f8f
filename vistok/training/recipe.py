"""A training run as data: dataclasses read from a YAML recipe, with unknown keys refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from vistok.training.augment import Augmentation


@dataclass(frozen=True)
class Optimization:
    """AdamW with a linear warm-up and a cosine decay to `final_lr`."""

    lr: float = 1e-3
    final_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01  # on matrices only
    warmup_steps: int = 200
    num_steps: int = 1000
    batch_size: int = 16
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    autocast: bool = True  # bfloat16 where the device has it


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on, besides the code.

    `task` holds the options of the task's own dataclass, `model` the constructor arguments of the model.
    """

    kind: str  # "tokenizer", "next-token", "class-conditional" or "drafter"
    model: dict[str, Any]
    task: dict[str, Any]
    model_class: str | None = None  # its public name; a tokenizer is a ConvTiTok by default
    optimization: Optimization = field(default_factory=Optimization)
    augmentation: Augmentation = field(default_factory=Augmentation)
    start_from: str | None = None  # folder of a model whose weights training starts with
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500

    def to_dict(self) -> dict[str, Any]:
        """Plain data, comparable between runs."""
        return asdict(self)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a YAML mapping, or a key that no recipe has.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe {path} does not exist; the package's own are in vistok/training/recipes"
        )
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} is not a recipe: expected a mapping of {', '.join(f.name for f in fields(Recipe))}"
        )
    return parse_recipe(data, str(path))


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data; unknown and missing keys are errors that name `where`."""
    parts = {"optimization": Optimization, "augmentation": Augmentation}
    parsed = {name: from_mapping(kind, data.get(name, {}), where) for name, kind in parts.items()}
    return from_mapping(Recipe, {**data, **parsed}, where)


def from_mapping(kind: type, values: dict[str, Any], where: str) -> Any:
    """An instance of the dataclass `kind`; unknown and missing keys are errors that name `where`."""
    names = [f.name for f in fields(kind)]
    for key in values:
        if key not in names:
            close = get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
