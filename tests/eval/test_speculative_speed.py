"""The times of speculative decoding at tiny sizes: that they are of the same work, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vistok.eval import speed_families
from vistok.eval.speculative_speed import Bench, Run, drafters, main, measure
from vistok.eval.speed_subjects import OrderedSubject
from vistok.models.generators.llamagen import LlamaGenClass
from vistok.models.generators.nar import NARClass

SIZES = {"codebook_size": 20, "num_tokens": 16, "num_classes": 5, "dim": 16, "depth": 3, "num_heads": 2}


@pytest.fixture
def bench() -> Bench:
    torch.manual_seed(0)
    return Bench(LlamaGenClass(**SIZES, mlp_dim=24).eval(), num_tokens=9, guidance_scale=2.0, repeats=1)


@torch.inference_mode()
def test_a_pass_over_one_node_is_a_plain_step(bench: Bench) -> None:
    step, read, longer = bench._step(), bench._pass(1), bench._pass(3)
    for _ in range(2):  # again: nothing stays in the cache
        torch.testing.assert_close(read().logits, step())
    torch.testing.assert_close(longer().logits[:, :1], step())


def test_measurement(bench: Bench) -> None:
    measured = measure("tiny", bench, [1, 3])
    assert [one.num_nodes for one in measured.passes] == [1, 2, 4]
    assert measured.passes[0].relative == 1 and measured.step_seconds > 0
    assert [(run.drafter, run.num_drafted) for run in measured.runs] == [
        (name, count) for count in (1, 3) for name in ("Jacobi", "EAGLE", "generator of 2 blocks")
    ]
    for run in measured.runs:
        assert 1 < run.tokens_per_pass <= run.num_drafted + 1
        assert run.target_seconds > 0 and run.draft_seconds > 0
        assert run.speed_up_at(run.tokens_per_pass) == pytest.approx(run.speed_up * 8 / 8, rel=1e-6)
    assert [run.num_parameters > 0 for run in measured.runs[:3]] == [False, True, True]


def test_the_small_generator_is_smaller(bench: Bench) -> None:
    small = drafters(bench.model, 2)["generator of 2 blocks"][0].model
    assert len(small.blocks) == 2 and small.config["dim"] == bench.model.config["dim"]


def test_tokens_for_a_speed_up() -> None:
    run = Run(
        "x",
        4,
        0,
        2.0,
        0.8,
        seconds_per_pass=0.05,
        target_seconds=0.03,
        draft_seconds=0.01,
        plain_seconds=0.02,
    )
    assert run.speed_up_at(2.0) == pytest.approx(0.8)
    assert run.tokens_for(1) == pytest.approx(2.5) and run.speed_up_at(run.tokens_for(1.3)) == pytest.approx(
        1.3
    )


def test_a_generator_in_another_order_is_refused() -> None:
    model = NARClass(**SIZES, mlp_dim=24)
    with pytest.raises(ValueError, match="nothing to speculate about"):
        measure("nar", Bench(model, 4, 1.0, 1), [1])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    families = {"llamagen-b": lambda: OrderedSubject(LlamaGenClass(**SIZES, mlp_dim=24).eval(), torch.arange)}
    monkeypatch.setattr(speed_families, "FAMILIES", families)
    options = ["--num-drafted", "2", "--num-tokens", "6", "--repeats", "1", "--guidance-scale", "1"]
    main(["-o", str(tmp_path / "out"), *options])
    report = json.loads(capsys.readouterr().out)
    assert [one["dtype"] for one in report["measurements"]] == ["float32", "bfloat16"]
    assert all(len(one["runs"]) == 3 for one in report["measurements"])
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Weights are random" in page and "two rows per image" not in page and report["machine"] in page
    assert (tmp_path / "out" / "speculative-speed.png").stat().st_size > 1000
