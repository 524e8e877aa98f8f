from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import vistok
from tests.tiny import GENERATOR, save_tiny_pipeline
from vistok.models.drafters.early_exit import EarlyExitAdapter
from vistok.training.augment import Augmentation
from vistok.training.early_exit import EarlyExitTask
from vistok.training.recipe import Optimization, Recipe
from vistok.training.run import run
from vistok.training.target_task import TargetOptions

EMOJI = Path(__file__).parent.parent / "data" / "emoji"
CLASSES = {
    "codebook_size": 20,
    "num_tokens": 16,
    "num_classes": 3,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 24,
}
ADAPTER = {"codebook_size": 20, "num_blocks": 1, "dim": 16, "num_heads": 2}
OPTIONS = {"num_images": 24, "images_per_shard": 8, "heldout_images": 8, "law_size": 20}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    """The folder of a class-conditional generator that makes something else of every token."""
    torch.manual_seed(0)
    model = vistok.LlamaGenClass(**CLASSES)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    folder = tmp_path_factory.mktemp("target") / "generator"
    model.save_pretrained(folder)
    return str(folder)


def task_of(target: str, folder: Path, **changes) -> EarlyExitTask:
    torch.manual_seed(0)
    adapter = EarlyExitAdapter(**ADAPTER | changes.pop("model", {}))
    options = TargetOptions(target, **OPTIONS | changes)
    return EarlyExitTask(adapter, options, Augmentation(), torch.device("cpu"), folder, seed=0)


def recipe_of(target: str) -> Recipe:
    return Recipe(
        "drafter",
        ADAPTER,
        {"target": target, **OPTIONS, "guidance_scale": 1.5},
        model_class="EarlyExitAdapter",
        optimization=Optimization(
            num_steps=40, warmup_steps=2, batch_size=16, lr=1e-2, ema_decay=0.9, autocast=False
        ),
        checkpoint_every=40,
    )


def test_it_learns_and_then_drafts(target: str, tmp_path: Path) -> None:
    task = task_of(target, tmp_path / "before", guidance_scale=1.5)
    before = task.evaluate(task.model.eval())["heldout_acceptance"]
    measured = run(recipe_of(target), tmp_path)
    assert 0 < before < measured["heldout_acceptance"] <= 1
    assert isinstance(vistok.load(tmp_path / "model"), EarlyExitAdapter)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_loss_reaches_the_adapter_alone(target: str, tmp_path: Path, guidance_scale: float) -> None:
    task = task_of(target, tmp_path, guidance_scale=guidance_scale)
    torch.nn.init.normal_(task.model.attn.proj.weight)
    loss, _ = task.loss(task.batch(4, torch.Generator().manual_seed(0)))
    loss.backward()
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in task.target.parameters())


def test_a_target_of_texts_is_drawn_from_its_prompts(tmp_path: Path) -> None:
    pipeline = save_tiny_pipeline(tmp_path / "pipeline", seed=0)
    deeper = vistok.TextAR(**GENERATOR | {"depth": 2})
    deeper.save_pretrained(pipeline / "transformer")
    task = task_of(str(pipeline), tmp_path, prompts=str(EMOJI), model={"codebook_size": 20})
    loss, _ = task.loss(task.batch(2, torch.Generator().manual_seed(0)))
    assert loss.isfinite()
    assert task.conditions.shape == (24, 16) and task.settings.guidance_scale == 2.0


def test_what_does_not_fit_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_blocks must be in 1\.\.1"):
        task_of(target, tmp_path, model={"num_blocks": 2})
    with pytest.raises(ValueError, match=r"heldout_images must be in 1\.\.23"):
        task_of(target, tmp_path, heldout_images=24)
    recipe = dataclasses.replace(recipe_of(target), model_class="TextAR")
    with pytest.raises(ValueError, match="must be EagleDrafter or EarlyExitAdapter"):
        run(recipe, tmp_path)
    recipe = dataclasses.replace(recipe_of(target), augmentation=Augmentation(flip=0.5))
    with pytest.raises(ValueError, match="images of the target are not augmented"):
        run(recipe, tmp_path)
