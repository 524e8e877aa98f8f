from __future__ import annotations

import json

import pytest

import vistok
from tests.tiny import save_tiny_pipeline
from vistok.training.assemble import assemble


@pytest.fixture
def trained(tmp_path):
    folder = save_tiny_pipeline(tmp_path / "pipeline", seed=0)
    return folder / "tokenizer", folder / "transformer"


def test_an_assembled_pipeline_is_half_precision_and_says_nothing_of_its_origin(trained, tmp_path):
    assemble(*trained, tmp_path / "joined", guidance_scale=1.5)
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "joined").rglob("*.json"))
    assert "_name_or_path" not in json.loads((tmp_path / "joined" / "tokenizer" / "config.json").read_text())
    assert all(
        file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "joined").rglob("*") if file.is_file()
    )
    sizes = [file.stat().st_size for file in (tmp_path / "joined" / "tokenizer").glob("*.safetensors")]
    whole = [file.stat().st_size for file in trained[0].glob("*.safetensors")]
    assert sum(sizes) < 0.7 * sum(whole)  # not quite half: the header of a tiny file is large


def test_an_existing_folder_is_left_alone(trained, tmp_path):
    (tmp_path / "joined").mkdir()
    with pytest.raises(FileExistsError, match="remove it first"):
        assemble(*trained, tmp_path / "joined")
    assert list((tmp_path / "joined").iterdir()) == []


def test_parts_that_do_not_fit_are_refused(trained, tmp_path):
    other = vistok.TextAR(codebook_size=7, num_tokens=6, dim=16, depth=1, num_heads=2, mlp_dim=16)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="7"):
        assemble(trained[0], tmp_path / "other", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
