"""Training of tokenizers: which model on which data, dropped tails and the perceptual distance."""

from __future__ import annotations

import dataclasses
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

import vistok
from vistok import VQGAN
from vistok.data.images import load_folder, to_pil
from vistok.training.augment import Augmentation
from vistok.training.perceptual import PerceptualLoss
from vistok.training.recipe import Optimization, Recipe, load_recipe
from vistok.training.run import run
from vistok.training.tokenizer import draw_lengths

FIXTURES = Path(__file__).parent.parent / "data" / "emoji"
GRID = {
    "image_size": 16,
    "codebook_size": 32,
    "codebook_dim": 4,
    "latent_dim": 8,
    "dim": 32,
    "dim_mults": [1, 1],
    "depth": 1,
}
FOLDERS = {"train": str(FIXTURES / "train"), "heldout": str(FIXTURES / "heldout"), "source_size": 16}


def grid_recipe(task: dict[str, Any] = FOLDERS, **changes: Any) -> Recipe:
    return Recipe(
        "tokenizer",
        changes.pop("model", GRID),
        {"channels_last": False, **task},
        model_class="VQGAN",
        optimization=Optimization(num_steps=3, warmup_steps=1, batch_size=4, autocast=False),
        augmentation=Augmentation(flip=0.5),
        log_every=1,
        **changes,
    )


def write_cifar10(folder: Path, count: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    noise = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for split in ("train", "test"):
        rows = []
        for picture in to_pil(noise):
            buffer = BytesIO()
            picture.save(buffer, "png")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        parquet.write_table(pyarrow.table({"image": rows, "label": [0] * count}), folder / f"{split}.parquet")


def test_a_grid_tokenizer_trains_and_its_codebook_learns(tmp_path):
    measured = run(grid_recipe(), tmp_path)
    model = VQGAN.from_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    assert not torch.allclose(model.codebook, VQGAN(**GRID).codebook, atol=1e-4)
    assert 0 < measured["heldout_codebook_usage"] <= 1 and measured["heldout_psnr"] > 0
    assert "batch_codes_used" in (tmp_path / "metrics.jsonl").read_text()


def test_the_quantizers_loss_is_part_of_the_loss(tmp_path):
    free, costly = (GRID | {"commitment_cost": cost} for cost in (0.0, 100.0))
    losses = []
    for name, model in (("free", free), ("costly", costly)):
        run(grid_recipe(model=model), tmp_path / name)
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] > losses[0] + 1


def test_cifar10_is_read_in_place_of_folders(tmp_path):
    write_cifar10(tmp_path, 6)
    model = GRID | {"image_size": 32}
    task = {"cifar10": str(tmp_path), "heldout_images": 2}
    assert run(grid_recipe(task, model=model), tmp_path / "run")["heldout_psnr"] > 0
    with pytest.raises(ValueError, match="CIFAR-10 has 32x32 pixels, the tokenizer takes 16"):
        run(grid_recipe(task), tmp_path / "other")


@pytest.mark.parametrize("task", [{}, {"train": "x"}, FOLDERS | {"cifar10": "x"}])
def test_no_data_half_of_it_and_both_kinds_are_refused(tmp_path, task):
    with pytest.raises(ValueError, match="either train and heldout, or cifar10"):
        run(grid_recipe(task), tmp_path)


def test_a_frozen_encoder_keeps_every_token(tmp_path):
    run(grid_recipe(), tmp_path / "first")
    start = {"start_from": str(tmp_path / "first" / "model"), "seed": 1}
    run(grid_recipe(FOLDERS | {"freeze_encoder": True}, **start), tmp_path / "second")
    first, second = (
        VQGAN.from_pretrained(tmp_path / name / "model").state_dict() for name in ("first", "second")
    )
    changed = {key.split(".")[0] for key, value in first.items() if not torch.equal(value, second[key])}
    assert changed == {"decoder"}


def test_impossible_trainings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="VQGAN has a fixed length: tail_drop must be 0"):
        run(grid_recipe(FOLDERS | {"tail_drop": 0.5}), tmp_path)
    with pytest.raises(
        ValueError, match="'TextAR' is not a tokenizer that can be trained: ConvTiTok, KLTokenizer, VQGAN"
    ):
        run(dataclasses.replace(grid_recipe(), model_class="TextAR"), tmp_path)


def test_the_recipe_for_cifar10_builds_a_grid_of_64_tokens():
    from vistok.cli.train import find_recipe

    recipe = load_recipe(find_recipe("cifar10-tokenizer"))
    assert VQGAN(**recipe.model).layout.grid == (8, 8) and recipe.model_class == "VQGAN"


def draw(tail_drop: float, count: int = 4000) -> torch.Tensor:
    return draw_lengths(count, 64, tail_drop, torch.Generator().manual_seed(0))


def test_no_tail_drop_keeps_every_token():
    assert bool((draw(0.0) == 64).all())


def test_dropped_lengths_are_log_uniform_from_one_to_all():
    lengths = draw(1.0)
    assert lengths.min() == 1 and lengths.max() == 64
    # every octave gets about a sixth: 4000 draws have a standard error of 0.6 %
    for low in (2, 4, 8, 16, 32):
        share = ((lengths >= low) & (lengths < 2 * low)).float().mean().item()
        assert share == pytest.approx(1 / 6, abs=0.05)


def test_tail_drop_is_the_share_of_shortened_images():
    assert (draw(0.4) < 64).float().mean().item() == pytest.approx(0.4, abs=0.04)


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss(64)


def picture() -> torch.Tensor:
    ramp = torch.linspace(-1, 1, 32)
    return torch.stack([ramp.expand(32, 32), ramp.expand(32, 32).T, -ramp.expand(32, 32)])[None]


def test_the_same_picture_is_at_distance_zero_and_blur_is_seen(perceptual):
    image = picture()
    noisy = (image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert perceptual(image, image) == 0
    assert perceptual(noisy, image) > 0.05


def test_only_the_reconstruction_gets_a_gradient(perceptual):
    image, target = picture().mul(0.5).requires_grad_(), picture().requires_grad_()
    perceptual(image, target).backward()
    assert image.grad is not None and bool(image.grad.abs().sum() > 0)
    assert target.grad is None and all(p.grad is None for p in perceptual.parameters())


def test_statistics_stay_those_of_imagenet(perceptual):
    assert not any(module.training for module in perceptual.train().modules())


KL = {
    "image_size": 16,
    "latent_channels": 3,
    "dims": [8, 8, 8],
    "depth": 1,
    "num_groups": 4,
    "mid_attention": False,
}


def kl_recipe(**task: Any) -> Recipe:
    recipe = grid_recipe(FOLDERS | task, model=KL)
    return dataclasses.replace(recipe, model_class="KLTokenizer")


def test_a_continuous_tokenizer_learns_and_records_the_scale_of_its_latents(tmp_path: Path) -> None:
    recipe = kl_recipe(kl=1e-4, source_size=24)  # kept larger than the model takes them
    longer = dataclasses.replace(recipe.optimization, num_steps=60, lr=1e-2, warmup_steps=5, ema_decay=0.9)
    measured = run(dataclasses.replace(recipe, optimization=longer, checkpoint_every=60), tmp_path)
    untrained = run(dataclasses.replace(recipe, seed=0), tmp_path / "short")
    assert measured["heldout_psnr"] > untrained["heldout_psnr"] + 1 and measured["heldout_kl"] > 0
    tokenizer = vistok.load(tmp_path / "model")
    images = load_folder(FIXTURES / "train", 16).float() / 127.5 - 1
    with torch.no_grad():
        scaled = tokenizer.encode(images).data * tokenizer.scaling_factor
    assert float(scaled.std()) == pytest.approx(1.0, abs=0.1)


def test_a_large_divergence_weight_draws_posteriors_to_the_prior(tmp_path: Path) -> None:
    few = {"num_steps": 40, "lr": 1e-2, "warmup_steps": 5, "ema_decay": 0.5, "batch_size": 4}
    recipes = [
        dataclasses.replace(kl_recipe(kl=kl), optimization=Optimization(**few), checkpoint_every=40)
        for kl in (0.0, 1.0)
    ]
    free, bound = (run(recipe, tmp_path / str(i))["heldout_kl"] for i, recipe in enumerate(recipes))
    assert bound < 0.2 * free
