from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import vistok

HEAVY = ("torch", "diffusers", "numpy", "PIL", "gradio", "rich")


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom vistok.cli.main import main\n"
        f"try: main(['--help'])\nfinally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    before = os.times()
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = os.times()
    assert finished.stderr.strip() == "[]"
    for command in (
        "generate",
        "tokenize",
        "detokenize",
        "reconstruct",
        "train",
        "convert",
        "models",
        "info",
        "doctor",
    ):
        assert f"\n  {command} " in finished.stdout
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1, f"{used:.2f} s of CPU time"


def test_a_fresh_process_draws_reports_one_line_and_loads_no_measuring_packages(
    model: Path, out: Path
) -> None:
    script = (
        "import sys\nfrom vistok.cli.main import main\n"
        "try: main()\nfinally: print('LOADED', *sys.modules, file=sys.stderr)"
    )
    arguments = [
        "generate",
        "red apple",
        "blue car",
        "-o",
        str(out / "grid.png"),
        "--model",
        str(model),
        "--seed",
        "3",
    ]
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    elapsed = time.perf_counter() - start
    report = json.loads(finished.stdout)  # a second line, or anything else on stdout, would not parse
    assert report["command"] == "generate" and report["seed"] == 3 and report["num_images"] == 2
    assert report["sampling"] == vistok.load(model).sampling_settings()
    assert (report["sampling"]["guidance_scale"], report["sampling"]["top_p"]) == (2.0, 0.9)
    assert 0 < report["seconds"] < elapsed and report["tokens_per_second"] > 0
    assert report["output"] == str(out / "grid.png") and report["vistok"] == vistok.__version__
    loaded = set(finished.stderr.rpartition("LOADED ")[2].split())
    assert "torch" in loaded and not loaded & {"torch_fidelity", "gradio", "timm", "vistok.training.run"}


def test_module_and_version(run) -> None:
    finished = run("--version")
    assert finished.code == 0 and finished.stdout == f"vistok {vistok.__version__}\n"
    shown = subprocess.run(
        [sys.executable, "-m", "vistok", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == finished.stdout


def test_a_defect_of_ours_keeps_its_traceback(run, monkeypatch, model: Path, out: Path) -> None:
    import pytest

    monkeypatch.setattr("vistok.hub.load_pipeline", lambda *args, **kwargs: {}["defect"])
    with pytest.raises(KeyError, match="defect"):
        run("generate", "a", "-o", out / "a.png", "--model", model)
