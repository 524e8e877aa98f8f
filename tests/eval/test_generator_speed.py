"""The benchmark of the generators at tiny sizes, and that it compares equal things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vistok.eval import generator_speed
from vistok.eval.generator_speed import (
    Bandwidth,
    build_generator,
    cache_difference,
    main,
    measure,
    measure_bandwidth,
    plain_step,
    weight_bytes,
)
from vistok.models.generators.llamagen import GridTransformer, LlamaGenClass
from vistok.models.generators.nar import NARClass

SIZES = {"codebook_size": 20, "num_tokens": 16, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2}
TINY = {
    "llamagen-b": lambda: LlamaGenClass(**SIZES, mlp_dim=24),
    "nar-b": lambda: NARClass(**SIZES, mlp_dim=24),
}
BANDWIDTH = Bandwidth(read=2e9, copy=1e9)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_speed, "FAMILIES", TINY)


@pytest.mark.parametrize("family", TINY)
@torch.inference_mode()
def test_a_plain_step_gives_the_logits_of_the_whole_sequence(family: str) -> None:
    model = build_generator(family)
    labels = torch.tensor([3, 1])
    indices = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    whole = model(labels, indices)
    assert whole.std() > 1e-2  # all heads compute
    for step, positions in enumerate(model.order.plan()):
        if step:
            logits = plain_step(model, labels, indices, step)
            torch.testing.assert_close(logits, whole[:, positions], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "num_forwards", "decided"), [("llamagen-b", 16, [1, 8, 15]), ("nar-b", 7, [1, 6, 15])]
)
def test_measurements(family: str, num_forwards: int, decided: list[int], dtype: torch.dtype) -> None:
    model = build_generator(family).to(dtype)
    measured = measure(family, model, BANDWIDTH, batch_size=2, repeats=1)
    assert (measured.family, measured.dtype) == (family, str(dtype).removeprefix("torch."))
    assert (measured.batch_size, measured.num_forwards) == (2, num_forwards)
    seconds = 2 * measured.seconds_per_image
    least = weight_bytes(model) * num_forwards / 2e9
    assert measured.weights_share == pytest.approx(least / seconds)
    assert measured.weights_mib == weight_bytes(model) / 2**20
    assert [step.num_decided for step in measured.steps] == decided
    assert all(step.seconds > 0 and step.plain_seconds > 0 for step in measured.steps)


def test_weights_that_a_forward_reads() -> None:
    model = build_generator("llamagen-b")
    block = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16  # attention, MLP, norms
    assert weight_bytes(model) == 4 * (2 * block + 16 + 16 * 20)
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * (2 * block + 16 + 16 * 20)


@pytest.mark.parametrize("family", TINY)
def test_a_wrong_cache_is_not_timed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_generator(family)
    assert cache_difference(model) < 1e-5
    step = GridTransformer.read_next

    def wrong(self, indices, cache, mask):
        return step(self, (indices + (cache.length > 8)) % 20, cache, mask)  # from some token on, another one

    monkeypatch.setattr(GridTransformer, "read_next", wrong)
    with pytest.raises(
        ValueError, match=rf"{family}, float32: logits with a cache and without differ by \d\.\d"
    ):
        measure(family, model, BANDWIDTH, batch_size=1, repeats=1)


def test_bandwidth_is_plausible() -> None:
    bandwidth = measure_bandwidth(num_bytes=2**24, repeats=3)
    assert 1e8 < bandwidth.read < 1e13 and 1e8 < bandwidth.copy < 1e13
    assert bandwidth.best == max(bandwidth.read, bandwidth.copy)


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="unknown family 'llamagen-xxl'; choose from llamagen-b, nar-b"):
        build_generator("llamagen-xxl")


def test_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator_speed, "measure_bandwidth", lambda: BANDWIDTH)
    main(["-o", str(tmp_path / "speed"), "--families", *TINY, "--repeats", "1", "--batch-sizes", "1", "2"])
    stored = json.loads((tmp_path / "speed" / "generator-speed.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    rows = [(m["family"], m["dtype"], m["batch_size"]) for m in stored["measurements"]]
    assert rows == [(f, d, b) for f in TINY for d in ("float32", "bfloat16") for b in (1, 2)]
    page = (tmp_path / "speed" / "report.md").read_text()
    for measured in stored["measurements"]:
        label = f"| {measured['family']} | {measured['dtype']} | {measured['batch_size']} | "
        assert f"{label}{measured['seconds_per_image']:.2f} | {measured['num_forwards']} |" in page
        assert page.count(label) == 1 + len(measured["steps"])
    assert stored["machine"] in page and "read 2.0 GB/s" in page
