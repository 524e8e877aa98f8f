from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import vistok
from tests.cifar10 import (
    CODEBOOK_SIZE,
    NUM_TOKENS,
    save_tiny_cifar10,
    save_tiny_kl_tokenizer,
    save_tiny_sequence_tokenizer,
    save_tiny_tokenizer,
)
from vistok.training import labelled_tokens
from vistok.training.augment import Augmentation
from vistok.training.class_generator import ClassGeneratorOptions, ClassGeneratorTask, null_label
from vistok.training.recipe import Optimization, Recipe
from vistok.training.run import run

SIZES = {
    "codebook_size": CODEBOOK_SIZE,
    "num_tokens": NUM_TOKENS,
    "num_classes": 10,
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 16,
}
GRID = {**SIZES, "layout": "4x4"}
FLOW = {
    "num_tokens": NUM_TOKENS,
    "layout": "4x4",
    "num_classes": 10,
    "dim": 16,
    "num_heads": 2,
    "mlp_dim": 16,
}
FLOW |= {"encoder_depth": 1, "decoder_depth": 1, "dropout": 0.0, "attention_dropout": 0.0}
KINDS = {
    "llamagen": ("LlamaGenClass", SIZES, {}),
    "nar": ("NARClass", SIZES, {}),
    "flex-ar": ("FlexARClass", SIZES, {}),
    "diagonal": ("AnyOrderAR", {**GRID, "order": "diagonal"}, {}),
    "random": ("AnyOrderAR", {**GRID, "order": "random-0"}, {"random_orders": True}),
    "masked": ("AnyOrderMasked", GRID, {}),
    "maskgit": ("MaskGITBert", SIZES, {}),
    "xar": ("XAR", {**FLOW, "order": "cells-2"}, {}),
    "mar": ("MAR", {**FLOW, "num_buffer_tokens": 2, "denoiser_dim": 16, "denoiser_depth": 1}, {}),
}
TOKENIZERS = {"flex-ar": "sequence", "maskgit": "sequence", "xar": "kl", "mar": "kl"}  # all others: "grid"
MEASURES = {"masked": "heldout_masked_loss", "maskgit": "heldout_masked_loss"} | {
    "xar": "heldout_flow_loss",
    "mar": "heldout_diffusion_loss",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options of a task on a tiny set; all tests share its tokens."""
    folder = tmp_path_factory.mktemp("data")
    save_tiny_sequence_tokenizer(folder / "sequence")
    save_tiny_kl_tokenizer(folder / "kl")
    return {
        "tokenizer": str(save_tiny_tokenizer(folder / "grid")),
        "cifar10": str(save_tiny_cifar10(folder / "cifar10")),
        "tokens": str(folder),
        "heldout_images": 15,
    }


def data_of(kind: str, data: dict) -> dict:
    """The same images, with the tokenizer that this kind needs."""
    return {**data, "tokenizer": str(Path(data["tokenizer"]).with_name(TOKENIZERS.get(kind, "grid")))}


def recipe_of(kind: str, data: dict, **optimization) -> Recipe:
    model_class, model, task = KINDS[kind]
    options = {"num_steps": 4, "warmup_steps": 1, "batch_size": 8, **optimization}
    return Recipe(
        "class-conditional",
        model,
        {**data_of(kind, data), **task},
        model_class=model_class,
        optimization=Optimization(**options),
        augmentation=Augmentation(flip=0.5),
        log_every=1,
        checkpoint_every=2,
    )


def make_task(kind: str, data: dict, folder, flip: float = 0.5, **changes) -> ClassGeneratorTask:
    model_class, model, task = KINDS[kind]
    torch.manual_seed(0)
    options = ClassGeneratorOptions(**{**data_of(kind, data), **task, **changes})
    tokenizer = vistok.load(options.tokenizer)
    latents = {"latent_dim": 2, "latent_scale": 2.5} if kind in ("xar", "mar") else {}
    made = getattr(vistok, model_class)(**model, **latents)
    return ClassGeneratorTask(made, tokenizer, options, Augmentation(flip=flip), torch.device("cpu"), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind, data, tmp_path):
    """The images of a class are alike, so a few dozen steps must beat guessing by far."""
    recipe = recipe_of(kind, data, num_steps=45, lr=3e-2, warmup_steps=3, ema_decay=0.8)
    measured = run(dataclasses.replace(recipe, checkpoint_every=45), tmp_path)
    (name, value), *rest = measured.items()
    assert not rest and name == MEASURES.get(kind, "heldout_nll")
    untrained = make_task(kind, data, tmp_path)
    assert value < 0.7 * untrained.evaluate(untrained.model.eval())[name]
    vistok.load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["diagonal", "random", "masked", "xar", "mar"])
def test_an_interrupted_run_continues_to_the_same_weights(kind, data, tmp_path, monkeypatch):
    recipe = recipe_of(kind, data)
    run(recipe, tmp_path / "whole")
    original, calls = ClassGeneratorTask.batch, []

    def stop_at_the_fourth(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(ClassGeneratorTask, "batch", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "parts")
    monkeypatch.setattr(ClassGeneratorTask, "batch", original)
    run(recipe, tmp_path / "parts")
    whole, parts = (
        next((tmp_path / name / "model").glob("*.safetensors")).read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts


@pytest.mark.parametrize("kind", ["llamagen", "flex-ar", "masked"])
def test_labels_are_dropped_and_images_flipped_as_often_as_asked(kind, data, tmp_path):
    def batch(**changes):
        task = make_task(kind, data, tmp_path, **changes)
        return task, *task.batch(400, torch.Generator().manual_seed(0))[:2]

    task, labels, indices = batch(flip=0.0, label_dropout=0.25)
    null = null_label(task.model)
    assert 0.15 < float((labels == null).float().mean()) < 0.35
    pairs = {
        (label, tuple(row))
        for label, row in zip(task.train.labels.tolist(), task.train.plain.tolist(), strict=True)
    }
    drawn = zip(labels.tolist(), indices.tolist(), strict=True)
    assert all((label, tuple(row)) in pairs for label, row in drawn if label != null)
    task, labels, indices = batch(flip=1.0, label_dropout=0.0)
    assert null not in labels.tolist()
    flipped = {tuple(row) for row in task.train.flipped.tolist()}
    assert all(tuple(row) in flipped for row in indices.tolist())


def test_the_heldout_likelihood_follows_the_chain_rule(data, tmp_path):
    """Token by token through the cache, in the order of the model, the same number comes out."""
    task = make_task("diagonal", data, tmp_path)
    model = task.model.eval()
    total = 0.0
    for label, row in zip(task.heldout.labels, task.heldout.plain, strict=True):
        cache = model.new_cache(1)
        with torch.inference_mode():
            logits = model.prefill(label[None], cache)
            for step, positions in enumerate(model.order.plan()):
                true = row[positions]
                total -= float(logits.log_softmax(-1)[0, torch.arange(len(true)), true].sum())
                if step + 1 < model.order.num_steps:
                    logits = model.step(true[None], cache)
    assert task.evaluate(model)["heldout_nll"] == pytest.approx(total / task.heldout.plain.numel(), rel=1e-5)


def test_the_masked_loss_is_measured_on_the_same_masks_every_time(data, tmp_path):
    task = make_task("masked", data, tmp_path)
    assert task.evaluate(task.model.eval()) == task.evaluate(task.model)


def test_images_are_tokenized_once(data, tmp_path, monkeypatch):
    changes = {"tokens": str(tmp_path)}
    first = make_task("masked", data, tmp_path, **changes)
    monkeypatch.setattr(labelled_tokens, "load_cifar10", None)  # reading the images again would fail
    second = make_task("llamagen", data, tmp_path, **changes)
    assert torch.equal(first.train.flipped, second.train.flipped)
    assert torch.equal(first.heldout.plain, second.heldout.plain)
    assert not torch.equal(first.train.plain, first.train.flipped)


def test_tokens_of_another_tokenizer_are_not_used(data, tmp_path):
    changes = {"tokens": str(tmp_path)}
    first = make_task("masked", data, tmp_path, **changes)
    tokenizer = vistok.load(data["tokenizer"])
    torch.nn.init.normal_(tokenizer.encoder.to_codes.weight)
    tokenizer.save_pretrained(tmp_path / "other")
    second = make_task("masked", data, tmp_path, **changes, tokenizer=str(tmp_path / "other"))
    assert not torch.equal(first.train.plain, second.train.plain)


def test_posteriors_are_drawn_anew_and_mirrored(data, tmp_path):
    task = make_task("xar", data, tmp_path, flip=1.0)
    labels, posterior, tokens, times, noise = task.batch(6, torch.Generator().manual_seed(0))
    assert posterior.shape == (6, NUM_TOKENS, 4) and tokens.shape == noise.shape == (6, NUM_TOKENS, 2)
    assert times.shape == (6, task.model.order.num_steps)
    mean, std = posterior.float().chunk(2, dim=-1)
    drawn = (tokens - mean) / std
    assert abs(float(drawn.mean())) < 0.3 and 0.8 < float(drawn.std()) < 1.2
    mirrored = [row.tolist() for row in task.train.flipped]
    assert all(row.tolist() in mirrored for row in posterior)


def test_a_continuous_generator_learns_the_scale_of_its_tokenizer(data, tmp_path):
    run(recipe_of("xar", data, num_steps=1), tmp_path)
    model = vistok.load(tmp_path / "model")
    assert (model.latent_dim, model.latent_scale) == (2, 2.5)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "llamagen",
            {"codebook_size": 9},
            "LlamaGenClass does not fit VQGAN: its codebook_size is 9 and not 8",
        ),
        (
            "diagonal",
            {"layout": "2x8"},
            "makes tokens on a grid of 2x8, the tokenizer decodes them on a grid of 4x4",
        ),
        ("nar", {"num_classes": 9}, "classes up to 9, the model 9 of them"),
        ("xar", {"latent_scale": 1.0}, "its latent_scale is 1.0 and the tokenizer's scaling_factor 2.5"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(kind, change, message, data, tmp_path):
    recipe = recipe_of(kind, data)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(recipe, model={**recipe.model, **change}), tmp_path)


def test_what_cannot_be_trained_so_is_refused(data, tmp_path):
    recipe = recipe_of("llamagen", data)
    with pytest.raises(ValueError, match="LlamaGenClass cannot follow any order"):
        run(dataclasses.replace(recipe, task={**recipe.task, "random_orders": True}), tmp_path)
    with pytest.raises(ValueError, match="'TextAR' is not a class-conditional generator"):
        run(dataclasses.replace(recipe, model_class="TextAR"), tmp_path)
    with pytest.raises(ValueError, match="can only be flipped"):
        run(dataclasses.replace(recipe, augmentation=Augmentation(hue=0.5)), tmp_path)
    with pytest.raises(
        ValueError, match="it makes continuous latents, the tokenizer decodes codebook indices"
    ):
        run(dataclasses.replace(recipe, model_class="XAR", model={**FLOW, "order": "raster"}), tmp_path)
    assert not (tmp_path / "model").exists()


def test_the_measures_are_logged(data, tmp_path):
    run(recipe_of("masked", data), tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "heldout_masked_loss" in line] == [2, 4]
    assert all(0 <= line["accuracy"] <= 1 for line in logged if "loss" in line)
