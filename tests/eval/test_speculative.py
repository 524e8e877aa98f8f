"""The measurement of speculative decoding with tiny models: rows, what is kept between calls, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vistok
from tests.cifar10 import CODEBOOK_SIZE, NUM_TOKENS, save_tiny_cifar10, save_tiny_tokenizer
from tests.tiny import save_tiny_pipeline
from vistok.decoding.speculative.drafters.independent import IndependentDrafter
from vistok.eval import speculative, speculative_subject
from vistok.eval.speculative import Protocol, evaluate_speculative, read_report
from vistok.eval.speculative_methods import NamedDrafter, default_names, named_drafters, named_rules
from vistok.eval.speculative_report import write_report
from vistok.eval.speculative_subject import Parts, load_subject

SIZES = {"codebook_size": CODEBOOK_SIZE, "num_tokens": NUM_TOKENS, "dim": 16, "num_heads": 2, "mlp_dim": 16}


@pytest.fixture
def class_models(tmp_path: Path) -> Path:
    """A generator, a smaller one and a tokenizer in separate folders."""
    torch.manual_seed(0)
    for name, depth in (("model", 2), ("small", 1)):
        model = vistok.LlamaGenClass(**SIZES, depth=depth, num_classes=10)
        torch.nn.init.normal_(
            model.head.weight, std=0.2
        )  # it begins with zeros, which predict all tokens alike
        model.save_pretrained(tmp_path / name)
    save_tiny_tokenizer(tmp_path / "tokenizer")
    save_tiny_cifar10(tmp_path / "cifar10")
    return tmp_path


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch, extractor) -> None:
    monkeypatch.setattr(speculative_subject, "load_extractor", lambda name, device: extractor)


def measure(subject, judge, names, folder: Path, accept=("strict",)):
    drafters = [one for name in names for one in named_drafters(name, subject.model)]
    rules = named_rules(accept, subject.tokenizer, ks=[3], deltas=[0.5])
    protocol = Protocol.of(subject, judge, num_timed=4, batch_sizes=[1, 4], repeats=1)
    return evaluate_speculative(subject, judge, drafters, rules, protocol, folder)


def test_a_class_conditional_pair(class_models: Path) -> None:
    parts = Parts.load(str(class_models / "model"), str(class_models / "tokenizer"), {"guidance_scale": 1.5})
    subject, judge = load_subject(parts, class_models / "cifar10", 12, "means", class_models)
    assert subject.conditions.tolist() == [*range(10), 0, 1] and subject.settings.guidance_scale == 1.5
    names = ["jacobi@chain-2", "neighbours", f"{class_models / 'small'}@chain-2"]
    report = measure(subject, judge, names, class_models, accept=("strict", "lantern"))
    assert [(row.drafter, row.rule) for row in report.rows] == [
        (drafter, rule)
        for drafter in ("Jacobi", "neighbour copies", "small generator")
        for rule in ("strict", "LANTERN k 3, δ 0.5")
    ]
    for row in report.rows:
        assert row.tokens_per_pass >= 1 and row.passes_saved == pytest.approx(1 - 1 / row.tokens_per_pass)
        assert (row.mean_variation is None) == row.is_lossless == (row.rule == "strict")
        assert row.quality is not None and row.quality.recognised is None
        assert [timing.batch_size for timing in row.timings] == [1, 4]
        assert all(timing.speed_up == timing.plain_seconds / timing.seconds for timing in row.timings)
        assert all(timing.target_passes <= NUM_TOKENS - 1 for timing in row.timings)
    assert all(row.tokens_per_pass > 1.2 for row in report.rows[-2:])
    assert report.rows[-1].mean_variation > 0.01
    assert all(timing.draft_passes > timing.target_passes for timing in report.rows[-1].timings)
    assert [row.first_seed for row in report.plain] == [0, 12, 24]
    assert all(0 < row.laws.entropy < 3 and row.laws.certain_share == 0 for row in report.plain)  # 8 codes


def test_emoji_are_recognised(tmp_path: Path, emoji_folder: Path) -> None:
    parts = Parts.load(str(save_tiny_pipeline(tmp_path / "tiny", seed=0)), None, {"top_p": 0.5})
    subject, judge = load_subject(parts, emoji_folder, 9, "means", tmp_path)
    assert subject.settings.top_p == 0.5 and subject.settings.guidance_scale == 2.0  # the pipeline's own
    assert judge is not None and len(judge.real) == 15 and len(set(judge.names)) == 9
    kept = load_subject(parts, emoji_folder, 9, "means", tmp_path)[1]
    assert torch.equal(kept.real.features, judge.real.features)
    report = measure(subject, judge, ["jacobi@chain-2"], tmp_path)
    assert report.rows[0].quality.recognised.num_images == 9
    assert report.plain[0].quality != report.plain[1].quality  # other seeds


def test_rows_are_not_measured_twice(class_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts.load(str(class_models / "model"), str(class_models / "tokenizer"), {})
    subject, _ = load_subject(parts, None, 4, "means", class_models)
    first = measure(subject, None, ["jacobi@chain-2"], class_models)
    assert read_report(class_models / "speculative.json", first.protocol) == first
    second = measure(subject, None, ["jacobi@chain-2", "jacobi@chain-3"], class_models)
    assert second.rows[0] == first.rows[0] and second.plain == first.plain and len(second.rows) == 2
    monkeypatch.setattr(speculative, "_measure", None)
    assert measure(subject, None, ["jacobi@chain-3"], class_models) == second
    with pytest.raises(ValueError, match="measurement with other num_images"):
        measure(load_subject(parts, None, 5, "means", class_models)[0], None, ["jacobi"], class_models)


def test_the_report(class_models: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = Parts.load(str(class_models / "model"), str(class_models / "tokenizer"), {})
    subject, judge = load_subject(parts, class_models / "cifar10", 4, "means", class_models)
    report = measure(subject, judge, ["jacobi@chain-2"], class_models, accept=("strict", "lantern"))
    files = write_report(report, class_models)
    assert all(file.stat().st_size > 1000 for file in files)
    page = (class_models / "report.md").read_text()
    assert "| Jacobi | chain-2 | LANTERN k 3, δ 0.5, lossy | " in page and "| plain, seeds from 4 |" in page
    assert report.protocol.machine in page and str(class_models) not in page
    stored = json.loads((class_models / "speculative.json").read_text())
    assert len(stored["rows"]) == 2 and stored["protocol"]["num_images"] == 4


def test_what_does_not_fit_is_refused_before_anything_is_measured(
    class_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = save_tiny_pipeline(tmp_path / "tiny", seed=0)
    with pytest.raises(ValueError, match="name its tokenizer"):
        Parts.load(str(class_models / "model"), None, {})
    with pytest.raises(ValueError, match="emoji set with --data"):
        load_subject(Parts.load(str(tiny), None, {}), None, 4, "means", tmp_path)
    parts = Parts.load(str(class_models / "model"), str(class_models / "tokenizer"), {})
    subject, _ = load_subject(parts, None, 4, "means", class_models)
    with pytest.raises(ValueError, match="at least as many as the largest batch"):
        Protocol.of(subject, None, num_timed=2, batch_sizes=[4], repeats=1)
    monkeypatch.setattr(speculative, "_measure_plain", None)
    other = vistok.LlamaGenClass(**{**SIZES, "codebook_size": 9}, depth=1, num_classes=10)
    misfit = NamedDrafter("small generator", "default", "", 0, IndependentDrafter(other))
    protocol = Protocol.of(subject, None, num_timed=4, batch_sizes=[1], repeats=1)
    rules = named_rules(["strict"], subject.tokenizer, [], [])
    with pytest.raises(ValueError, match="9 token ids"):
        evaluate_speculative(subject, None, [misfit], rules, protocol, tmp_path)
    assert replace(protocol, model="another") != protocol


def test_default_drafters_fit_the_layout(class_models: Path, tmp_path: Path) -> None:
    grid = Parts.load(str(class_models / "model"), str(class_models / "tokenizer"), {})
    line = Parts.load(str(save_tiny_pipeline(tmp_path / "tiny", seed=0)), None, {})
    assert default_names(grid.model) == ["jacobi", "recycling", "neighbours"]
    assert default_names(line.model) == ["jacobi", "recycling"]
