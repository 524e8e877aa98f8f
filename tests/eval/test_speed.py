"""The benchmark of all families at tiny sizes: what it measures, refuses and keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vistok.decoding.guidance import LinearGuidance
from vistok.eval import speed, speed_bench, speed_families, speed_report, speed_selection, speed_ways
from vistok.eval.random_weights import randomize
from vistok.eval.speed import run
from vistok.eval.speed_bench import Bench, ParityError
from vistok.eval.speed_cells import Cell, Measurement, SpeedReport
from vistok.eval.speed_floor import Rates
from vistok.eval.speed_report import AIMS, write_report
from vistok.eval.speed_selection import PRESETS, Selection, choose
from vistok.eval.speed_subjects import MaskedSubject, OrderedSubject
from vistok.models.generators.llamagen import LlamaGenClass
from vistok.models.generators.maskgit import MaskGITBert
from vistok.models.generators.nar import NARClass

SIZES: dict[str, Any] = {"codebook_size": 50, "num_tokens": 64, "dim": 32, "num_heads": 2, "mlp_dim": 48}
RATES = Rates(read=2e9, copy=1e9, matmul={"float32": 1e9, "bfloat16": 2e9})


def tiny(model: Any) -> Any:
    return randomize(model).eval()


TINY = {
    "llamagen-b": lambda: OrderedSubject(tiny(LlamaGenClass(**SIZES, depth=2, num_classes=99)), torch.arange),
    "nar-b": lambda: OrderedSubject(tiny(NARClass(**SIZES, depth=2, num_classes=99)), torch.arange),
    "maskgit": lambda: MaskedSubject(
        tiny(MaskGITBert(**SIZES, depth=1, num_classes=99)), 4, LinearGuidance(2.0)
    ),
}
RELEASED = speed_selection.FAMILIES
CPU = torch.device("cpu")
EAGER = ("plain", "eager")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (speed, speed_families, speed_selection):
        monkeypatch.setattr(module, "FAMILIES", TINY)
    monkeypatch.setattr(speed, "measure_rates", lambda device, dtypes: RATES)


def selection(**options: Any) -> Selection:
    plain: dict[str, Any] = {"families": tuple(TINY), "ways": EAGER, "dtypes": ("float32", "bfloat16")}
    return Selection(**{**plain, "batch_sizes": (1, 2), "repeats": 1, **options})


def quiet(report: SpeedReport) -> None:
    """Writes nothing."""


@pytest.mark.parametrize("family", TINY)
def test_a_cell(family: str) -> None:
    bench = Bench(family, RATES, CPU)
    for dtype, allowed in (("float32", 1e-4), ("bfloat16", 0.1)):
        bench.convert(dtype)
        cell = Cell(family, "eager", dtype, 2)
        measured = bench.measure(cell, bench.prepare("eager"), repeats=1, longest=100.0)
        assert 0 < measured.seconds <= measured.first_seconds and measured.share == 1
        assert measured.difference <= measured.allowed <= allowed
        passes = bench.subject.passes(2, 1)
        assert measured.floor == pytest.approx(
            sum(one.count * max(one.bytes / 2e9, one.flops / RATES.matmul[dtype]) for one in passes)
        )
        assert measured.num_passes == len(passes) == {"llamagen-b": 64, "nar-b": 15, "maskgit": 4}[family]
        assert measured.tokens_per_second == pytest.approx(2 * 64 / measured.seconds)
        assert measured.over_floor == pytest.approx(measured.seconds / measured.floor)


def test_a_long_call_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("llamagen-b", RATES, CPU)
    shares: list[int] = []
    draw = bench.subject.draw
    monkeypatch.setattr(
        bench.subject, "draw", lambda model, size, share: shares.append(share) or draw(model, size, share)
    )
    prepared = bench.prepare("eager")
    cell = Cell("llamagen-b", "eager", "float32", 1)
    monkeypatch.setattr(
        bench, "_seconds", lambda call: (call(), 1.0)[1]
    )  # the least share is as much as allowed
    measured = bench.measure(cell, prepared, repeats=2, longest=1.0)
    assert measured.share == 16 and shares == [16] * 5
    assert draw(prepared.model, 1, 16) is None and draw(prepared.model, 1, 1).data.shape == (1, 64)
    ratio = bench._floor(1, 1) / bench._floor(1, 16)
    assert 16 < ratio < 20  # the cache of a whole image is longer
    short = measured.seconds / ratio
    assert measured.floor / ratio == pytest.approx(bench._floor(1, 16)) and short > 0
    assert bench.measure(replace(cell, way="compiled"), prepared, repeats=1, longest=9e9).share == 16


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = OrderedSubject.outputs
    monkeypatch.setattr(OrderedSubject, "outputs", lambda self, model: outputs(self, model) + 1e-2)
    with pytest.raises(ParityError, match=r"llamagen-b, eager, float32: what it computes is off by 0\.\d+"):
        run([selection()], tmp_path, write=quiet)
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert [one["cell"]["way"] for one in stored["measurements"]] == ["plain", "plain"]


def test_nan_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = OrderedSubject.outputs
    monkeypatch.setattr(OrderedSubject, "outputs", lambda self, model: outputs(self, model) * float("nan"))
    with pytest.raises(ParityError, match="is off by nan"):
        run([selection()], tmp_path, write=quiet)


def test_a_run_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = run([selection(families=("nar-b",), dtypes=("float32",))], tmp_path, write=quiet)
    assert len(first.measurements) == 4
    built: list[str] = []
    build = speed_bench.build_subject
    monkeypatch.setattr(speed_bench, "build_subject", lambda family: built.append(family) or build(family))
    again = run([selection(families=("nar-b", "maskgit"), dtypes=("float32",))], tmp_path, write=quiet)
    assert built == ["maskgit"] and again.measurements[:4] == first.measurements
    assert len(again.measurements) == 8 and set(again.protocols) == {"nar-b", "maskgit"}
    assert again.protocols["nar-b"] == "64 tokens in 15 steps, guidance 2"


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run([selection(families=("nar-b",), dtypes=("float32",))], tmp_path, write=quiet)
    monkeypatch.setattr(speed, "describe_machine", lambda: "another one")
    with pytest.raises(ValueError, match="has measurements of machine .* choose another folder"):
        run([selection()], tmp_path, write=quiet)


def test_what_is_not_there_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(model: Any, quantization: str) -> Any:
        raise ModuleNotFoundError("int8 weights need a package")

    def refuse(model: Any) -> Any:
        raise ValueError("nothing of it compiles")

    monkeypatch.setattr(speed_ways, "quantize_weights", missing)
    monkeypatch.setattr(speed_ways, "compile_model", refuse)
    chosen = selection(families=("maskgit",), ways=("eager", "compiled"), dtypes=("float32", "int8"))
    report = run([chosen], tmp_path, write=quiet)
    assert {one.cell.dtype for one in report.measurements} == {"float32"}
    assert report.skipped["maskgit, eager, int8, batch 1"] == "int8 weights need a package"
    assert report.skipped["maskgit, compiled, float32, batch 2"] == "nothing of it compiles"
    again = run([chosen], tmp_path, write=quiet)
    assert again.skipped == report.skipped and again.measurements == report.measurements


def test_a_batch_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed_bench, "peak_memory", lambda call, device: call() or 300.0)
    monkeypatch.setattr(speed, "_free_mib", lambda device: 400.0)
    report = run(
        [selection(families=("nar-b",), dtypes=("float32",), batch_sizes=(3, 4))], tmp_path, write=quiet
    )
    assert [one.cell.batch_size for one in report.measurements] == [3, 3]
    reason = report.skipped["nar-b, eager, float32, batch 4"]
    assert "MiB beside the weights, 400 MiB are free" in reason and len(report.skipped) == 2


def test_memory_that_runs_out_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Any, model: Any, batch_size: int, share: int) -> Any:
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(OrderedSubject, "draw", full)
    report = run([selection(families=("nar-b",), dtypes=("float32",))], tmp_path, write=quiet)
    assert [one.cell.way for one in report.measurements] == ["plain", "plain"]
    assert report.skipped == {f"nar-b, eager, float32, batch {size}": "out of memory" for size in (1, 2)}


def test_the_start_of_a_way_counts_for_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("nar-b", RATES, CPU)
    seconds = iter([9.0, 2.0])
    monkeypatch.setattr(bench, "_seconds", lambda call: (call(), next(seconds, 0.0))[1])
    prepared = bench.prepare("eager")
    assert prepared.start == 7.0
    for size, more in ((1, 7.0), (2, 0.0)):
        cell = Cell("nar-b", "eager", "float32", size)
        measured = bench.measure(cell, prepared, repeats=1, longest=9.0)
        assert measured.first_seconds == pytest.approx(measured.seconds + more)


def test_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_selection, "FAMILIES", RELEASED)
    cells = selection(families=("nar-b",), dtypes=("bfloat16", "float32")).cells("nar-b")
    assert [(cell.way, cell.dtype, cell.batch_size) for cell in cells] == [
        *(("plain", "float32", size) for size in (1, 2)),
        *(("eager", dtype, size) for dtype in ("float32", "bfloat16") for size in (1, 2)),
    ]
    for preset, selections in PRESETS.items():
        assert choose(preset, families=None, repeats=None) == list(selections)
    quick = choose("quick", dtypes=["bfloat16"], repeats=7, longest=None)
    assert {(one.dtypes, one.repeats) for one in quick} == {(("bfloat16",), 7)}
    first, *_, general = choose("default", families=["mar-b", "llamagen-b"])
    assert (first.families, general.families) == (("llamagen-b",), ("mar-b", "llamagen-b"))
    assert first.longest > general.longest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("titok-xxl",)}, "unknown 'titok-xxl' in families; choose from llamagen-b"),
        ({"ways": ("fast",)}, "unknown 'fast' in ways; choose from plain, eager, compiled"),
        ({"dtypes": ("int4",)}, "unknown 'int4' in dtypes"),
        ({"batch_sizes": (0,)}, "must be at least 1"),
        ({"repeats": 0}, "must be at least 1"),
    ],
)
def test_bad_selections(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selection(**options)


def test_bad_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown preset 'slow'; choose from default, quick, full"):
        choose("slow")
    with pytest.raises(ValueError, match="not on 'mps'"):
        run([selection()], tmp_path, "mps", write=quiet)


def test_a_model_that_is_compiled_in_place_is_taken_back() -> None:
    subject = TINY["maskgit"]()
    made = speed_ways.WAYS["compiled"](subject)
    assert speed_ways.drawn_with(subject, made) is subject.model and "forward" in vars(subject.model)
    speed_ways.finish(made)
    assert "forward" not in vars(subject.model)


def measurement(family: str, way: str, dtype: str, seconds: float, floor: float = 1.0) -> Measurement:
    return Measurement(
        cell=Cell(family, way, dtype, 1),
        seconds=seconds,
        first_seconds=seconds + 1,
        floor=floor,
        is_memory_bound=True,
        share=4,
        num_tokens=256,
        num_passes=256,
        bytes_per_pass=2.0**20,
        flops_per_pass=3e9,
        weights_mib=11.0,
        peak_mib=None,
        difference=1e-3,
        allowed=2e-3,
    )


def test_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        measurement("llamagen-b", "plain", "float32", 9.0),
        measurement("llamagen-b", "eager", "bfloat16", 6.0),
        measurement("llamagen-b", "compiled", "bfloat16", 3.0, floor=2.0),
        measurement("nar-b", "eager", "bfloat16", 1.0),
    ]
    report = SpeedReport(RATES, "cpu", "a machine", 2, "0.1", 3, rows, {"nar-b, eager, int8, batch 1": "no."})
    report.protocols = {"nar-b": "64 tokens", "llamagen-b": "256 tokens"}
    report.parameters = {"nar-b": 2_000_000, "llamagen-b": 1_000_000}
    faster, over, ratio, *missing = (aim.cells(report) for aim in AIMS["cpu"])
    assert (faster[2:], over[2:], ratio[2:]) == (["3.00", "yes"], ["1.50", "yes"], ["3.00", "no"])
    assert all(row[2:] == ["not measured", ""] for row in missing)
    write_report(report, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert (
        "| llamagen-b | compiled | bfloat16 | 1 | 3 | 4 | 85.3 | 2 | 1.50 | memory | 3.00 | 1.0e-03 |" in page
    )
    assert "| llamagen-b | plain | float32 | 1 | 11 | - | 256 | 1 | 3 | 1 in 4 |" in page
    assert "Not measured: nar-b, eager, int8, batch 1: no." in page and "a machine" in page
    assert (tmp_path / "speed.png").stat().st_size > 1000 and "(speed.png)" in page


def test_a_report_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed_report, "find_spec", lambda name: None)
    report = SpeedReport(RATES, "cpu", "a machine", 2, "0.1")
    write_report(report, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert "speed.png" not in (tmp_path / "report.md").read_text()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = [
        "--families",
        "nar-b",
        "--dtypes",
        "bfloat16",
        "--ways",
        "plain",
        "eager",
        "--batch-sizes",
        "2",
    ]
    speed.main(["-o", str(tmp_path / "out"), "--quick", *options])
    stored = json.loads(capsys.readouterr().out)
    assert stored == json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [one["cell"]["dtype"] for one in stored["measurements"]] == ["float32", "bfloat16"]
    assert "nar-b" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("family", ["llamagen-b", "nar-b"])
def test_compiled_steps_are_compared_with_the_plain_loop(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    subject = TINY[family]()
    model = speed_ways.WAYS["compiled"](subject)
    assert model is not subject.model
    torch.testing.assert_close(subject.outputs(model), subject.plain_outputs(), atol=1e-5, rtol=0)
    assert subject.draw(model, 2, 1).data.shape == (2, 64)
