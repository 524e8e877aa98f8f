from __future__ import annotations

import json

import pytest
import torch
import yaml
from PIL import Image

import vistok
from tests.cifar10 import (
    CODEBOOK_SIZE,
    NUM_TOKENS,
    save_tiny_cifar10,
    save_tiny_kl_tokenizer,
    save_tiny_tokenizer,
)
from vistok.eval import generator_comparison
from vistok.eval.comparison_recipe import load_comparison, own_comparisons
from vistok.eval.generator_comparison import main
from vistok.eval.generator_measures import Sampling, draw_tokens, picture_sheet
from vistok.models.generators.base import MaskedGenerator

SHARED = {
    "num_tokens": NUM_TOKENS,
    "num_classes": 10,
    "dim": 16,
    "num_heads": 2,
    "mlp_dim": 16,
    "layout": "4x4",
}
NAR = {"model_class": "NARClass"}
CODES = {"codebook_size": CODEBOOK_SIZE, "depth": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def content(folder) -> dict:
    """A comparison of two generators of codes, one of them sampled in two ways, and of one of continuous tokens."""
    task = {
        "tokenizer": str(save_tiny_tokenizer(folder / "tokenizer")),
        "cifar10": str(save_tiny_cifar10(folder / "cifar10")),
        "heldout_images": 5,
    }
    optimization = {"num_steps": 50, "warmup_steps": 10, "batch_size": 8}
    return {
        "common": {"kind": "class-conditional", "model": SHARED, "task": task, "optimization": optimization},
        "generators": {
            "diagonal": {"model_class": "AnyOrderAR", "model": {**CODES, "order": "diagonal"}},
            "masked": {
                "model_class": "AnyOrderMasked",
                "model": CODES,
                "sampling": [
                    {"num_inference_steps": 2},
                    {"num_inference_steps": 3, "choice_temperature": 1.0},
                ],
            },
            "xar": {
                "model_class": "XAR",
                "model": {"order": "cells-2", "encoder_depth": 1, "decoder_depth": 1},
                "task": {"tokenizer": str(save_tiny_kl_tokenizer(folder / "kl"))},
                "sampling": [{"num_inference_steps": 3}],
            },
        },
        "evaluation": {
            "guidance_scales": [1.0, 2.0],
            "repeats": 1,
            "timed_batches": [1, 3],
            "seeds_per_class": 2,
        },
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes a comparison recipe and returns its path."""

    def write(content: dict):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_all_generators_are_trained_measured_and_reported_once(
    content, write, folder, extractor, monkeypatch, capsys
):
    monkeypatch.setattr(generator_comparison, "load_extractor", lambda name: extractor)
    output = folder / "output"
    command = [str(write(content)), "-o", str(output), "--budget-steps", "2", "--num-samples", "12"]
    main(command)
    report = json.loads(capsys.readouterr().out)
    names = ("name", "sampling", "num_steps", "num_denoising_steps", "order")
    assert [tuple(row[name] for name in names) for row in report["rows"]] == [
        ("diagonal", "", 7, None, "diagonal"),
        ("masked", "inference steps 2", 2, None, "the surest first"),
        ("masked", "inference steps 3, choice temperature 1.0", 3, None, "the surest first"),
        ("xar", "inference steps 3", 4, 12, "cells-2"),
    ]
    for row in report["rows"]:
        assert [point["guidance_scale"] for point in row["points"]] == [1.0, 2.0]
        assert all(point["frechet_distance"] >= 0 for point in row["points"])
        assert set(row["seconds"]) == {"1", "3"} and min(row["seconds"].values()) > 0
    assert report["num_training_images"] == 16
    assert report["originals"]["num_fake"] == 12 and report["originals"]["num_real"] == 12
    assert set(report["reconstructions"]) == {row["tokenizer"] for row in report["rows"]}
    assert all(floor["fid"] > report["originals"]["fid"] for floor in report["reconstructions"].values())
    page = (output / "report.md").read_text()
    assert "mean-colour" in page and "which is no likelihood" in page and str(folder) not in page
    with Image.open(output / "samples-masked-inference-steps-2.png") as sheet:
        assert sheet.size == (2 * (2 * 33 + 1), 2 * (10 * 33 + 1))

    def fail(*arguments):
        raise AssertionError("what is done must not be done again")

    monkeypatch.setattr(generator_comparison, "run", fail)
    more = {**content, "evaluation": {**content["evaluation"], "guidance_scales": [1.0, 2.0, 3.0]}}
    main([str(write(more)), *command[1:]])  # another scale, measured on top of what is there
    points = json.loads(capsys.readouterr().out)["rows"][0]["points"]
    assert points[:2] == report["rows"][0]["points"] and points[2]["guidance_scale"] == 3.0
    monkeypatch.setattr(generator_comparison, "measure_quality", fail)
    main(command)
    assert json.loads(capsys.readouterr().out)["rows"][0]["points"] == points
    with pytest.raises(AssertionError, match="must not be done again"):
        main([*command[:-1], "11"])


def test_one_generator_alone_writes_no_report(content, write, folder, extractor, monkeypatch, capsys):
    monkeypatch.setattr(generator_comparison, "load_extractor", lambda name: extractor)
    output = folder / "alone"
    options = ["--budget-steps", "1", "--num-samples", "10", "--only", "masked"]
    main([str(write(content)), "-o", str(output), *options])
    assert (output / "masked" / "measured.json").exists()
    assert not (output / "diagonal").exists() and not (output / "report.md").exists()
    assert capsys.readouterr().out == ""


def test_jobs_are_processes_with_the_same_arguments(monkeypatch):
    commands = []

    def remember(command, **options):
        commands.append(command[2:])
        return type("Done", (), {"returncode": int("bad" in command)})()

    monkeypatch.setattr(generator_comparison.subprocess, "run", remember)
    generator_comparison.work_in_processes(["r.yaml", "-o", "x"], ["a", "b"], jobs=2)
    module = "vistok.eval.generator_comparison"
    assert sorted(commands) == [[module, "r.yaml", "-o", "x", "--only", name] for name in "ab"]
    with pytest.raises(RuntimeError, match="bad failed"):
        generator_comparison.work_in_processes(["r.yaml"], ["a", "bad"], jobs=1)


def test_the_budget_is_cut_and_the_warm_up_with_it(content, write, tmp_path):
    contestants = load_comparison(write(content), tmp_path, budget_steps=5).contestants
    for contestant in contestants:
        optimization = contestant.recipe.optimization
        assert (optimization.num_steps, optimization.warmup_steps, optimization.batch_size) == (5, 5, 8)
        assert contestant.recipe.task["tokens"] == str(tmp_path)
    assert contestants[0].recipe.model == {**SHARED, **CODES, "order": "diagonal"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generators": {}}, "is not a comparison"),
        ({"evaluation": {"samples": 3}}, "unknown key 'samples'; did you mean"),
        ({"evaluation": {"timed_guidance": 1.0}}, "timed_guidance must be above 1"),
        ({"generators": {"a": {"kind": "tokenizer"}}}, "a comparison is of class-conditional trainings"),
        (
            {"generators": {"a": {"model_class": "MAR", "sampling": [{"steps": 3}]}}},
            "a: steps is not a setting of a MAR; it has guidance_scale",
        ),
        (
            {"generators": {"a": NAR, "b": {"optimization": {"num_steps": 9}}}},
            "b has its own optimization; all are trained alike",
        ),
        (
            {"generators": {"a": NAR, "b": {"task": {"cifar10": "x"}}}},
            "b has its own task; only random_orders and tokenizer may differ",
        ),
        ({"generators": {"a": NAR, "b": {"seed": 7}}}, "b has its own seed"),
        (
            {"generators": {"a": {**NAR, "sampling": [{"num_inference_steps": 3}]}}},
            "a: num_inference_steps is not a setting of a NARClass",
        ),
        (
            {"generators": {"a": {"model_class": "XAR", "sampling": [{"num_inference_steps": 1}]}}},
            "a: Euler-Maruyama needs at least 3 steps",
        ),
        ({"evaluation": {"guidance_scales": [0.5]}}, "guidance_scale must be at least 1"),
        ({"evaluation": {"num_samples": 0}}, "num_samples must be at least 1, got 0"),
    ],
)
def test_bad_comparisons_are_refused(content, write, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_comparison(write({**content, **change}), tmp_path)


def test_unknown_names_are_refused(content, write, tmp_path):
    with pytest.raises(FileNotFoundError, match="the package's own are cifar10-generators"):
        load_comparison(tmp_path / "missing.yaml", tmp_path)
    with pytest.raises(ValueError, match="no generator 'c' in this comparison; it has diagonal, masked, xar"):
        load_comparison(write(content), tmp_path).chosen("c")


def test_the_packages_comparison_is_fair(tmp_path):
    """Its generators are of one size, and each can be built."""
    comparison = load_comparison(own_comparisons()["cifar10-generators"], tmp_path)
    sizes = {}
    for contestant in comparison.contestants:
        latents = {"latent_dim": 6} if contestant.recipe.model_class in ("XAR", "MAR") else {}
        model = getattr(vistok, contestant.recipe.model_class)(**contestant.recipe.model, **latents)
        sizes[contestant.name] = sum(parameter.numel() for parameter in model.parameters())
        assert all(sampling.steps(model) >= 1 for sampling in contestant.samplings)
        assert not isinstance(model, MaskedGenerator) or all(one.settings for one in contestant.samplings)
    assert max(sizes.values()) < 1.1 * min(sizes.values())


def test_samples_depend_on_seed_and_class_alone(folder):
    torch.manual_seed(0)
    model = vistok.AnyOrderAR(**SHARED, **CODES, order="cells-2").eval()
    tokenizer = vistok.load(folder / "tokenizer")
    sheet = picture_sheet(model, tokenizer, sampling=Sampling(), guidance_scale=1.5, seeds_per_class=2)
    assert sheet.shape == (20, 3, 32, 32) and sheet.dtype == torch.uint8
    alone = draw_tokens(model, torch.tensor([3]), [1], Sampling(), 1.5)
    again = picture_sheet(model, tokenizer, sampling=Sampling(), guidance_scale=1.5, seeds_per_class=3)
    decoded = generator_comparison.decode(tokenizer, alone)[0].int()
    assert (sheet[3 * 2 + 1].int() - decoded).abs().max() <= 1 and (
        again[3 * 3 + 1].int() - decoded
    ).abs().max() <= 1
