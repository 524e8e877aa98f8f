"""A comparison of generators as data: one YAML recipe with what they share and what distinguishes each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import vistok
from vistok.decoding.guidance import check_guidance_scale
from vistok.eval.generator_measures import Sampling
from vistok.training.recipe import Recipe, from_mapping, parse_recipe

COMPARISONS = Path(__file__).parent / "comparisons"
OWN_TASK = ("random_orders", "tokenizer")  # what may differ between the tasks


@dataclass(frozen=True)
class EvaluationOptions:
    """How all generators are measured."""

    num_samples: int = 1000  # images drawn, equally many of each class; also of the reconstructions
    num_reference: int = 10000  # test images that they are compared with, the first ones
    extractor: str = "efficientnet-lite0"
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0)
    timed_guidance: float = 1.5  # above 1, so that both branches are computed
    timed_batches: tuple[int, ...] = (1, 64)
    repeats: int = 5  # timed batches of each size; the median counts
    seeds_per_class: int = 8  # of the pictures

    def __post_init__(self) -> None:
        for scale in self.guidance_scales:
            check_guidance_scale(scale)
        for name in ("num_samples", "num_reference", "repeats", "seeds_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Contestant:
    """One generator: its training, and the ways in which it is sampled."""

    name: str
    recipe: Recipe
    samplings: tuple[Sampling, ...]

    def check_samplings(self) -> None:
        """Raises ValueError when its kind of generator cannot be sampled so."""
        model_class = getattr(vistok, str(self.recipe.model_class), object)
        for sampling in self.samplings:
            try:
                sampling.check(model_class)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None


def _shared(task: dict[str, Any]) -> dict[str, Any]:
    """What all generators have in common of their tasks."""
    return {name: value for name, value in task.items() if name not in OWN_TASK}


@dataclass(frozen=True)
class Comparison:
    """What a comparison recipe says.

    Raises:
        ValueError: a generator with a budget or data of its own, or no guidance to time.
    """

    contestants: tuple[Contestant, ...]
    evaluation: EvaluationOptions

    def __post_init__(self) -> None:
        first = self.recipe
        for contestant in self.contestants:
            other = contestant.recipe
            for name in ("optimization", "augmentation", "seed"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(f"{contestant.name} has its own {name}; all are trained alike")
            if _shared(other.task) != _shared(first.task):
                raise ValueError(
                    f"{contestant.name} has its own task; only {' and '.join(OWN_TASK)} may differ"
                )
            contestant.check_samplings()
        if self.evaluation.timed_guidance <= 1:
            raise ValueError(f"timed_guidance must be above 1, got {self.evaluation.timed_guidance}")

    @property
    def recipe(self) -> Recipe:
        """That of the first generator, for what all have in common."""
        return self.contestants[0].recipe

    def chosen(self, name: str | None) -> tuple[Contestant, ...]:
        """The generator of that name, or all; raises ValueError for an unknown name."""
        chosen = tuple(one for one in self.contestants if name in (None, one.name))
        if not chosen:
            known = ", ".join(one.name for one in self.contestants)
            raise ValueError(f"there is no generator {name!r} in this comparison; it has {known}")
        return chosen


def load_comparison(
    path: Path, folder: Path, *, budget_steps: int | None = None, num_samples: int | None = None
) -> Comparison:
    """Read a comparison recipe.

    Args:
        path: a YAML mapping of `common` (a class-conditional recipe), `generators` (name -> what differs from it, and
            `sampling`, one or several mappings) and `evaluation`.
        folder: where all of them keep the tokenized images.
        budget_steps: train so many steps instead of the recipe's.
        num_samples: draw so many images, and compare with no more.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or missing key, another kind of training, or no generators.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"comparison {path} does not exist; the package's own are {', '.join(own_comparisons())}"
        )
    data = yaml.safe_load(path.read_text())
    wanted = {"common", "generators", "evaluation"}
    if not isinstance(data, dict) or set(data) != wanted or not data["generators"]:
        raise ValueError(f"{path} is not a comparison: expected {', '.join(sorted(wanted))}")
    common = data["common"]
    common["task"] = {**common.get("task", {}), "tokens": str(folder)}
    contestants = tuple(
        _contestant(name, common, own, path, budget_steps) for name, own in data["generators"].items()
    )
    evaluation = from_mapping(EvaluationOptions, data["evaluation"], str(path))
    if num_samples is not None:
        fewer = min(num_samples, evaluation.num_reference)
        evaluation = replace(evaluation, num_samples=num_samples, num_reference=fewer)
    return Comparison(contestants, evaluation)


def _contestant(
    name: str, common: dict[str, Any], own: dict[str, Any], path: Path, budget_steps: int | None
) -> Contestant:
    where = f"{path}, {name}"
    samplings = own.get("sampling", [{}])
    merged = {**common, **{key: value for key, value in own.items() if key != "sampling"}}
    for part in ("model", "task"):
        merged[part] = {**common.get(part, {}), **own.get(part, {})}
    recipe = parse_recipe(merged, where)
    if recipe.kind != "class-conditional":
        raise ValueError(f"{where}: a comparison is of class-conditional trainings, not {recipe.kind!r}")
    if budget_steps is not None:
        few = min(recipe.optimization.warmup_steps, budget_steps)
        shorter = replace(recipe.optimization, num_steps=budget_steps, warmup_steps=few)
        recipe = replace(recipe, optimization=shorter)
    return Contestant(name, recipe, tuple(Sampling(one) for one in samplings))


def own_comparisons() -> dict[str, Path]:
    """The package's own comparison recipes, by name."""
    return {file.stem: file for file in sorted(COMPARISONS.glob("*.yaml"))}
