"""The golden checker: it passes on the goldens of the project, and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden

GOLDENS = Path(__file__).parent / "goldens"
TINY = GOLDENS / "titok" / "tiny_vae.json"


@pytest.mark.parametrize("path", golden.find_goldens([GOLDENS])[0], ids=lambda path: path.stem)
def test_golden_passes(path: Path) -> None:
    verdict = golden.check_golden(path)
    assert verdict.status == "PASS", verdict.reasons


def test_every_released_kind_has_a_golden() -> None:
    names = {
        path.stem
        for path in golden.find_goldens([GOLDENS / name for name in ("titok", "one_d_piece", "maskgit")])[0]
    }
    assert names == {
        "tiny",
        "tiny_maskgit_vqgan",
        "tiny_uvit",
        "tiny_vae",
        "tiny_vit",
        "tiny_vq_single_stage",
        "tiny_vq_two_stage",
    }


@pytest.fixture
def copy(tmp_path: Path):
    """A copy of a golden with some tensors replaced (`None` removes) and some JSON entries changed."""

    def make(tensors: dict | None = None, **meta) -> Path:
        changed = load_file(TINY.with_suffix(".safetensors")) | (tensors or {})
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "copy.safetensors")
        (tmp_path / "copy.json").write_text(json.dumps(json.loads(TINY.read_text()) | meta))
        return tmp_path / "copy.json"

    return make


def test_one_line_per_golden_and_exit_code(copy, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy({"outputs/posterior_mean": torch.zeros(3, 8, 1, 9)})
    assert golden.main([str(TINY), str(path)]) == 1
    passed, failed = capsys.readouterr().out.splitlines()
    assert passed.startswith("PASS tiny_vae ") and passed.endswith(" -")
    assert float(passed.split()[2]) < 1e-4
    assert failed.startswith("FAIL copy ") and float(failed.split()[2]) > 1e-4


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"weights/decoder.ln_pre.bias": None}, "1 missing"),
        ({"weights/surprise": torch.zeros(1)}, "1 unexpected (surprise)"),
        ({"outputs/posterior_std": torch.zeros(3, 8, 9)}, "shape"),
        ({"outputs/posterior_mean": None}, "no outputs/posterior_mean"),
        ({"outputs/surprise": torch.zeros(1)}, "outputs/surprise was not compared"),
        ({"inputs/images": None}, "images"),
        ({"outputs/posterior_std": torch.full((3, 8, 1, 9), torch.nan)}, "off by inf"),
    ],
)
def test_a_wrong_golden_fails(copy, tensors: dict, reason: str) -> None:
    verdict = golden.check_golden(copy(tensors))
    assert verdict.status == "FAIL"
    assert reason in " ".join(verdict.reasons)


@pytest.mark.parametrize("meta", [{"system": "unheard_of"}, {"kind": "unheard_of"}, {"system": "case"}])
def test_an_unknown_system_or_kind_is_unsupported(copy, meta: dict) -> None:
    assert golden.check_golden(copy(**meta)).status == "UNSUPPORTED"
    assert golden.main([str(copy(**meta))]) == 1


def test_half_a_golden_fails(copy) -> None:
    path = copy()
    path.with_suffix(".safetensors").unlink()
    assert golden.main([str(path.parent)]) == 1


def test_manifests_are_skipped_and_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest-x.json").write_text("{}")
    assert golden.main([str(tmp_path)]) == 2
    assert golden.main([str(tmp_path / "absent")]) == 2


def test_checkpoints_beside_goldens_are_skipped(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    assert golden.find_goldens([tmp_path])[0] == []
    save_file({"outputs/codes": torch.zeros(1)}, tmp_path / "half.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\0")
    assert [path.stem for path in golden.find_goldens([tmp_path])[0]] == ["damaged", "half"]
