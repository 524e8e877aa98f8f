from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import vistok
from tests.golden_checks.case import GoldenCase
from tests.tiny import TOKENIZER
from vistok.cli.train import RECIPES, find_recipe
from vistok.models import upstream

GOLDEN = Path(__file__).parents[1] / "goldens" / "titok" / "tiny_vq_single_stage"


def test_train_makes_a_model_that_loads(run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(4):
        Image.effect_noise((20, 20), 60 + number).convert("RGB").save(tmp_path / "data" / f"{number}.png")
    recipe = {
        "kind": "tokenizer",
        "model": {**TOKENIZER, "levels": [5, 4]},
        "task": {"train": str(tmp_path / "data"), "heldout": str(tmp_path / "data"), "source_size": 20},
        "optimization": {"num_steps": 2, "batch_size": 2, "warmup_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    finished = run("train", tmp_path / "recipe.yaml", "-o", tmp_path / "runs" / "first", "--device", "cpu")
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["measured"]["heldout_psnr"] > 0 and report["seed"] == 0 and report["device"] == "cpu"
    assert vistok.load(report["output"]).num_tokens == 6


def test_the_package_s_recipes_are_found_by_name() -> None:
    assert (
        find_recipe("emoji-tokenizer")
        == find_recipe("emoji-tokenizer.yaml")
        == RECIPES / "emoji-tokenizer.yaml"
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("kind: tokenizer\nmodell: {}", "unknown key 'modell'"),
        ("- 1", "is not a recipe"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_faulty_recipe(run, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    finished = run("train", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    assert finished.code == 2 and word in finished.stderr and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, GoldenCase]:
    """(weights, configuration, golden) of a tiny official checkpoint."""
    case, folder = GoldenCase.read(GOLDEN), tmp_path_factory.mktemp("official")
    save_file(case.weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    return folder / "model.safetensors", folder / "config.json", case


def test_convert_saves_a_model_that_computes_the_same(run, official, out: Path) -> None:
    weights, config, case = official
    finished = run("convert", "titok", weights, "-o", out / "tiny", "--config", config)
    assert finished.code == 0, finished.stderr
    converted, expected = vistok.load(out / "tiny"), upstream.load("titok", case.weights, case.config)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(converted.encode(images).data, expected.encode(images).data)
    report = json.loads(finished.stdout)
    ((name, facts),) = report["files"].items()
    content = (out / "tiny" / name).read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert report["model"] == "TiTok"


def test_convert_needs_a_configuration_for_unknown_weights(run, official, out: Path) -> None:
    weights, config, _ = official
    finished = run("convert", "titok", weights, "-o", out / "tiny")
    assert finished.code == 2 and "give its configuration with --config" in finished.stderr
    finished = run("convert", "titok", weights, "-o", out / "tiny", "--release", "titok-l-23")
    assert finished.code == 2 and "did you mean titok-l-32" in finished.stderr
    finished = run("convert", "titok", weights, "-o", out / "tiny", "--release", "titok-l-32")
    assert finished.code == 2 and "vistok: error: " in finished.stderr
    finished = run("convert", "maskgit", weights, "-o", out / "tiny", "--config", config)
    assert finished.code == 2 and not list(out.iterdir())
