from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vistok.models.upstream.releases import RELEASES


@pytest.fixture
def shipped_model(model: Path, tmp_path: Path, monkeypatch) -> None:
    """`tiny-16` in place of what the package ships."""
    folder = shutil.copytree(model, tmp_path / "zoo" / "tiny-16")
    facts = {"description": "nothing yet", "licence": "MIT", "metrics": {"PSNR": 9.5}}
    (folder / "facts.json").write_text(json.dumps(facts))
    monkeypatch.setattr("vistok.zoo.ZOO", tmp_path / "zoo")


def test_models_lists_shipped_models_and_every_release(run, shipped_model) -> None:
    finished = run("models")
    assert finished.code == 0, finished.stderr
    rows = {line.split()[0]: line for line in finished.stdout.splitlines() if line}
    assert {"tiny-16", "tiny-16/tokenizer", "tiny-16/transformer", *RELEASES} <= rows.keys()
    assert "MIT" in rows["tiny-16"] and "PSNR (measured): 9.5" in rows["tiny-16"]
    for name, release in RELEASES.items():
        assert f" {release.size_mb or '-'} " in rows[name] and release.licence in rows[name]
    assert "published): 2.21" in rows["titok-l-32"] and "measured" not in rows["titok-l-32"]


def test_models_as_json(run) -> None:
    listed = json.loads(run("models", "--json").stdout)["models"]
    assert {row["name"] for row in listed} >= RELEASES.keys()


def test_info_of_a_shipped_model(run, shipped_model) -> None:
    facts = json.loads(run("info", "tiny-16", "--json").stdout)["model"]
    assert facts["description"] == "nothing yet" and facts["licence"] == "MIT"
    assert facts["class"] == "TextToImagePipeline" and facts["sampling"]["top_p"] == 0.9
    assert (
        facts["parts"]["tokenizer"]["num_tokens"] == 6 and facts["parts"]["transformer"]["text_length"] == 16
    )
    assert facts["parts"]["tokenizer"]["parameters"] > 0
    assert facts["parts"]["tokenizer"]["identity"].startswith("ConvTiTok-")


def test_info_of_a_release_says_where_its_weights_go(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    finished = run("info", "maskgit-titok-l-32")
    assert finished.code == 0, finished.stderr
    facts = json.loads(finished.stdout)
    assert facts["tokenizer"] == "titok-l-32" and facts["sampling"]["guidance_scale"] == 4.5
    assert (
        facts["weights"].startswith("not here") and str(tmp_path / "maskgit-titok-l-32") in facts["weights"]
    )


def test_doctor_names_versions_devices_and_why_backends_cannot_run(run) -> None:
    import torch

    finished = run("doctor")
    assert finished.code == 0, finished.stderr
    assert torch.__version__ in finished.stdout
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["attention_backends"]["sdpa on cpu"] == "runs"
    assert "needs CUDA tensors, got cpu" in facts["attention_backends"]["xformers on cpu"]
    assert "kernels" in facts["attention_backends"]["flash_hub on cpu"]  # in the words of diffusers
    assert "cpu" in facts["devices"] and "npm" in facts["programs"] and "gradio" in facts["optional_packages"]
