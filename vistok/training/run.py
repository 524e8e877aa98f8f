"""From a recipe to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vistok.training.recipe import Recipe, from_mapping
from vistok.training.trainer import Task, train


def run(recipe: Recipe, folder: Path, *, device: str = "cpu") -> dict[str, float]:
    """Train what `recipe` describes into `folder`; see `vistok.training.trainer.train`.

    Raises:
        ValueError: an unknown kind of training, or unknown options.
    """
    torch.manual_seed(recipe.seed)  # initial weights
    return train(_task(recipe, torch.device(device)), recipe, folder, device=torch.device(device))


def _task(recipe: Recipe, device: torch.device) -> Task:
    if recipe.kind == "tokenizer":
        from vistok.models.tokenizers.conv_titok import ConvTiTok
        from vistok.training.tokenizer import TokenizerOptions, TokenizerTask

        options = from_mapping(TokenizerOptions, recipe.task, "task")
        model = _initial(ConvTiTok, recipe).to(memory_format=torch.channels_last)
        return TokenizerTask(model, options, recipe.augmentation, device)
    if recipe.kind == "next-token":
        from vistok.models.generators.text_ar import TextAR
        from vistok.training.generator import GeneratorOptions, NextTokenTask

        data = from_mapping(GeneratorOptions, recipe.task, "task")
        return NextTokenTask(_initial(TextAR, recipe), data, recipe.augmentation, device, recipe.seed)
    raise ValueError(f"unknown kind of training {recipe.kind!r}; known: tokenizer, next-token")


def _initial(model_class: Any, recipe: Recipe) -> Any:
    """A model with fresh weights, or with those of `recipe.start_from`."""
    model = model_class(**recipe.model)
    if recipe.start_from is not None:
        trained = model_class.from_pretrained(recipe.start_from)
        model.load_state_dict(trained.state_dict())
    return model
