import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.training.augment import Augmentation
from vistok.training.recipe import Optimization, Recipe, load_recipe
from vistok.training.run import run
from vistok.training.trainer import learning_rate

FIXTURES = Path(__file__).parent.parent / "data" / "emoji"
MODEL = {
    "image_size": 16,
    "num_tokens": 4,
    "levels": [4, 4],
    "dim": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "num_heads": 2,
    "conv_dim": 8,
    "conv_depth": 1,
}
OPTIMIZATION = Optimization(num_steps=6, warmup_steps=2, batch_size=4)


def tokenizer_recipe() -> Recipe:
    task = {"train": str(FIXTURES / "train"), "heldout": str(FIXTURES / "heldout"), "source_size": 32}
    return Recipe(
        "tokenizer",
        MODEL,
        task,
        optimization=OPTIMIZATION,
        augmentation=Augmentation(flip=0.5, affine=0.5, hue=0.5),
        log_every=1,
        checkpoint_every=3,
    )


def weights(folder: Path) -> bytes:
    return next((folder / "model").glob("*.safetensors")).read_bytes()


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path, monkeypatch):
    recipe = tokenizer_recipe()
    run(recipe, tmp_path / "whole")

    from vistok.training import tokenizer as task_module

    original, calls = task_module.TokenizerTask.batch, []

    def stop_at_the_fifth(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(task_module.TokenizerTask, "batch", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "parts")
    assert not (tmp_path / "parts" / "model").exists()
    monkeypatch.setattr(task_module.TokenizerTask, "batch", original)
    run(recipe, tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert "batch_codes_used" in logs[0] and "heldout_codebook_usage" in logs[0]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run(tokenizer_recipe(), tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        run(dataclasses.replace(tokenizer_recipe(), seed=1), tmp_path)


def test_training_lowers_the_loss(tmp_path):
    optimization = dataclasses.replace(OPTIMIZATION, num_steps=60, lr=3e-3, autocast=False)
    recipe = dataclasses.replace(tokenizer_recipe(), optimization=optimization, checkpoint_every=60)
    run(recipe, tmp_path)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_training_starts_from_the_weights_of_another(tmp_path):
    run(tokenizer_recipe(), tmp_path / "first")
    start = {"start_from": str(tmp_path / "first" / "model")}
    options = dataclasses.replace(OPTIMIZATION, num_steps=1, lr=0.0, final_lr=0.0)
    task = {**tokenizer_recipe().task, "tail_drop": 0.5, "perceptual": 0.1, "perceptual_images": 2}
    run(
        dataclasses.replace(tokenizer_recipe(), **start, task=task, optimization=options), tmp_path / "second"
    )
    assert weights(tmp_path / "second") == weights(tmp_path / "first")
    logged = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["perceptual"] > 0


def test_a_frozen_encoder_keeps_every_token(tmp_path):
    run(tokenizer_recipe(), tmp_path / "first")
    task = {**tokenizer_recipe().task, "freeze_encoder": True}
    start = {"start_from": str(tmp_path / "first" / "model"), "seed": 1}
    run(dataclasses.replace(tokenizer_recipe(), task=task, **start), tmp_path / "second")
    first, second = (ConvTiTok.from_pretrained(tmp_path / name / "model") for name in ("first", "second"))
    same = {key: torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items()}
    assert all(equal for key, equal in same.items() if key.startswith("encoder."))
    assert not all(equal for key, equal in same.items() if key.startswith("decoder."))


def test_a_generator_trains_on_the_tokens_of_a_trained_tokenizer(tmp_path):
    run(tokenizer_recipe(), tmp_path / "tokenizer")
    model = {"codebook_size": 16, "num_tokens": 4, "dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    task = {
        "data": str(FIXTURES),
        "tokenizer": str(tmp_path / "tokenizer" / "model"),
        "source_size": 32,
        "variants": 2,
    }
    recipe = Recipe("next-token", model, task, optimization=OPTIMIZATION, checkpoint_every=3)
    measured = run(recipe, tmp_path / "generator")
    assert 0 < measured["train_nll"] < 4 and 0 < measured["heldout_nll"] < 4
    assert (tmp_path / "generator" / "model" / "config.json").exists()


def test_warm_up_and_cosine():
    options = Optimization(lr=1.0, final_lr=0.1, warmup_steps=10, num_steps=110)
    rates = [learning_rate(step, options) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[-1] < 0.11
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_shipped_recipes_parse():
    recipes = sorted((Path(load_recipe.__code__.co_filename).parent / "recipes").glob("*.yaml"))
    assert len(recipes) >= 2
    for recipe in recipes:
        assert load_recipe(recipe).kind in ("tokenizer", "next-token", "class-conditional", "drafter")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kind: tokenizer\nmodel: {}\ntask: {}\noptimization: {learning_rate: 1}",
            "unknown key 'learning_rate'",
        ),
        ("kind: tokenizer\nmodle: {}\ntask: {}", "did you mean 'model'"),
        ("- 1", "not a recipe"),
        ("a: [", "not valid YAML"),
        ("kind: tokenizer", "missing"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown kind of training 'gan'"):
        run(Recipe("gan", {}, {}), tmp_path)


def test_ema_starts_as_a_near_copy_and_then_lags():
    from vistok.training.ema import EMA

    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema = EMA(layer, 0.5)
    torch.nn.init.ones_(layer.weight)
    ema.update(layer)
    assert ema.average["weight"].item() == pytest.approx(1 - 2 / 11)
    for _ in range(20):
        ema.update(layer)
    assert ema.average["weight"].item() == pytest.approx(1.0, abs=1e-3)
