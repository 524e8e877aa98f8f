"""From a recipe to a trained model."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vistok.training.recipe import Recipe, from_mapping
from vistok.training.trainer import Task, train

# What `model_class` can name. A tokenizer is the first by default.
TOKENIZERS = ("ConvTiTok", "KLTokenizer", "VQGAN")
CLASS_GENERATORS = (
    "AnyOrderAR",
    "AnyOrderMasked",
    "FlexARClass",
    "LlamaGenClass",
    "MAR",
    "MaskGITBert",
    "NARClass",
    "XAR",
)


def run(recipe: Recipe, folder: Path, *, device: str = "cpu") -> dict[str, float]:
    """Train what `recipe` describes into `folder`; see `vistok.training.trainer.train`.

    Raises:
        ValueError: an unknown kind of training, or unknown options.
    """
    torch.manual_seed(recipe.seed)  # initial weights
    return train(_task(recipe, torch.device(device), folder), recipe, folder, device=torch.device(device))


def _task(recipe: Recipe, device: torch.device, folder: Path) -> Task:
    if recipe.kind == "tokenizer":
        return _tokenizer_task(recipe, device)
    if recipe.kind == "next-token":
        from vistok.models.generators.text_ar import TextAR
        from vistok.training.generator import GeneratorOptions, NextTokenTask

        if recipe.model_class not in (None, "TextAR"):
            raise ValueError(f"model_class must be TextAR for captioned emoji, got {recipe.model_class!r}")
        data = from_mapping(GeneratorOptions, recipe.task, "task")
        return NextTokenTask(_initial(TextAR, recipe), data, recipe.augmentation, device, recipe.seed)
    if recipe.kind == "class-conditional":
        return _class_generator_task(recipe, device, folder)
    if recipe.kind == "drafter":
        return _drafter_task(recipe, device, folder)
    raise ValueError(
        f"unknown kind of training {recipe.kind!r}; known: tokenizer, next-token, class-conditional, drafter"
    )


def _drafter_task(recipe: Recipe, device: torch.device, folder: Path) -> Task:
    rest = (recipe.augmentation, device, folder, recipe.seed)
    if recipe.model_class == "EarlyExitAdapter":
        from vistok.models.drafters.early_exit import EarlyExitAdapter
        from vistok.training.early_exit import EarlyExitTask
        from vistok.training.target_task import TargetOptions

        data = from_mapping(TargetOptions, recipe.task, "task")
        return EarlyExitTask(_initial(EarlyExitAdapter, recipe), data, *rest)
    if recipe.model_class not in (None, "EagleDrafter"):
        raise ValueError(
            f"model_class must be EagleDrafter or EarlyExitAdapter for a drafter, got {recipe.model_class!r}"
        )
    from vistok.models.drafters.eagle import EagleDrafter
    from vistok.training.drafter import DrafterOptions, DrafterTask

    goal = from_mapping(DrafterOptions, recipe.task, "task")
    return DrafterTask(_initial(EagleDrafter, recipe), goal, *rest)


def _tokenizer_task(recipe: Recipe, device: torch.device) -> Task:
    model = _initial(_tokenizer_class(recipe.model_class), recipe)
    if model.codebook_size is None:
        from vistok.training.kl_tokenizer import KLTokenizerOptions, KLTokenizerTask

        continuous = from_mapping(KLTokenizerOptions, recipe.task, "task")
        return KLTokenizerTask(model, continuous, recipe.augmentation, device)
    from vistok.training.tokenizer import TokenizerOptions, TokenizerTask

    options = from_mapping(TokenizerOptions, recipe.task, "task")
    return TokenizerTask(model, options, recipe.augmentation, device)


def _class_generator_task(recipe: Recipe, device: torch.device, folder: Path) -> Task:
    from vistok.hub import load_tokenizer
    from vistok.models.generators.base import ContinuousGenerator
    from vistok.models.tokenizers.kl import KLTokenizer
    from vistok.training.class_generator import ClassGeneratorOptions, ClassGeneratorTask

    options = from_mapping(ClassGeneratorOptions, recipe.task, "task")
    tokenizer = load_tokenizer(options.tokenizer, device=device)
    model_class = _generator_class(recipe.model_class)
    if issubclass(model_class, ContinuousGenerator) and isinstance(tokenizer, KLTokenizer):
        latents = {"latent_dim": tokenizer.latent_channels, "latent_scale": tokenizer.scaling_factor or 1.0}
        recipe = replace(recipe, model={**latents, **recipe.model})
    model = _initial(model_class, recipe)
    return ClassGeneratorTask(model, tokenizer, options, recipe.augmentation, device, folder)


def _tokenizer_class(name: str | None) -> Any:
    """The trainable tokenizer of that name."""
    if name not in (None, *TOKENIZERS):
        raise ValueError(
            f"model_class {name!r} is not a tokenizer that can be trained: {', '.join(TOKENIZERS)}"
        )
    return getattr(import_module("vistok"), name or TOKENIZERS[0])


def _generator_class(name: str | None) -> Any:
    """The class-conditional generator of that name."""
    if name not in CLASS_GENERATORS:
        raise ValueError(
            f"model_class {name!r} is not a class-conditional generator: {', '.join(CLASS_GENERATORS)}"
        )
    return getattr(import_module("vistok"), name)


def _initial(model_class: Any, recipe: Recipe) -> Any:
    """A model with fresh weights, or with those of `recipe.start_from`."""
    model = model_class(**recipe.model)
    if recipe.start_from is not None:
        trained = model_class.from_pretrained(recipe.start_from)
        model.load_state_dict(trained.state_dict())
    return model
