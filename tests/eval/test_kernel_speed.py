"""The benchmark of the operators at tiny sizes, and that it times nothing that computes something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vistok.eval import kernel_speed, kernel_subjects
from vistok.eval.kernel_speed import main, measure
from vistok.eval.kernel_subjects import (
    COMPILED,
    PLAIN,
    DecodeSizes,
    Subject,
    decode_subject,
    sampling_subject,
)
from vistok.eval.speed_floor import Rates

CPU = torch.device("cpu")
RATES = Rates(read=2e9, copy=1e9, matmul={"float32": 1e9, "bfloat16": 4e9})
TINY = DecodeSizes(rows=2, heads=2, num_new=3, length=5, max_length=12, head_dim=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_subjects, "DECODE", {"tiny": TINY, "step": replace(TINY, num_new=1)})
    monkeypatch.setattr(kernel_subjects, "VOCAB_SIZE", 50)
    monkeypatch.setattr(kernel_subjects, "SAMPLING", {"guidance": {}, "top-k": {"top_k": 7, "top_p": 0.8}})
    monkeypatch.setattr(kernel_subjects, "COLD_BYTES", 4000)
    monkeypatch.setattr(kernel_speed, "measure_rates", lambda device, dtypes: RATES)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def decode(dtype: torch.dtype = torch.float32) -> Subject:
    return decode_subject("tiny", TINY, CPU, dtype)


@torch.inference_mode()
def test_times_of_decode_attention() -> None:
    times = {time.way: time for time in measure(decode(), "float32", RATES, CPU, repeats=1)}
    assert list(times) == [PLAIN, "torch", COMPILED, "triton"]
    num_bytes = (
        2 * 2 * 8 * 4 * (2 * 5 + 6 * 3)
    )  # rows, heads, channels, bytes; keys and values, and the new ones
    flops = 4 * 2 * 2 * 8 * 3 * (5 + 3)
    for way in (PLAIN, "torch", COMPILED):
        assert times[way].seconds > 0 and times[way].error < 1e-5
        assert times[way].plain_seconds == times[PLAIN].seconds
        assert times[way].least_seconds == pytest.approx(max(num_bytes / 2e9, flops / 1e9))
    assert times["triton"].seconds is None and times["triton"].reason == "needs a GPU to be timed"


def test_calls_in_a_row_read_more_than_a_cache_keeps() -> None:
    subject = decode()
    assert subject.num_bytes * subject.num_inputs > 4000 >= subject.num_bytes * (subject.num_inputs - 1)


@torch.inference_mode()
def test_a_way_that_computes_something_else_is_not_timed() -> None:
    subject = decode()
    subject.ways["torch"] = lambda tensors: 1.1 * subject.ways[PLAIN](tensors)
    subject.ways["broken"] = lambda tensors: tensors[99]
    times = {time.way: time for time in measure(subject, "float32", RATES, CPU, repeats=1)}
    assert times["torch"].seconds is None and "does not compute the definition" in times["torch"].reason
    assert times["broken"].seconds is None and "IndexError" in times["broken"].reason
    assert times[COMPILED].seconds > 0


@torch.inference_mode()
def test_nothing_is_compared_with_a_wrong_plain_way() -> None:
    subject = decode()
    subject.ways[PLAIN] = lambda tensors: 2 * subject.ways["torch"](tensors)
    with pytest.raises(ValueError, match="decode attention, tiny: .* plain PyTorch is .* off the definition"):
        measure(subject, "float32", RATES, CPU, repeats=1)


@torch.inference_mode()
def test_tokens_must_be_those_of_the_definition() -> None:
    subject = sampling_subject("guidance", 3, {}, CPU, torch.float32)
    arguments = subject.inputs(0)
    tokens, exact = subject.ways[PLAIN](arguments), subject.exact(arguments)
    assert subject.difference(tokens, exact) == 0
    tokens[1] = (tokens[1] + 1) % 50
    assert subject.difference(tokens, exact) == 1
    subject.ways["other"] = lambda arguments: tokens
    other = measure(subject, "float32", RATES, CPU, repeats=1)[1]
    assert (other.way, other.seconds, other.error) == ("other", None, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-o", str(tmp_path / "speed"), "--dtypes", dtype, "--repeats", "1"])
    stored: dict[str, Any] = json.loads((tmp_path / "speed" / "kernel-speed.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    counts = dict.fromkeys(("decode attention", "sampling", "attention"), 0)
    page = (tmp_path / "speed" / "report.md").read_text()
    for time in stored["times"]:
        row = f"| {time['setting']} | {dtype} | {time['way']} | "
        assert page.count(row) == (time["seconds"] is not None)
        counts[time["kernel"]] += time["seconds"] is not None
    assert counts == {"decode attention": 2 * 3, "sampling": 2 * 2, "attention": 4 * 2}
    assert "- decode attention, triton: needs a GPU to be timed\n" in page
    assert "read 2.0 GB/s" in page and stored["machine"] in page


def test_only_some_kernels(tmp_path: Path) -> None:
    main(["-o", str(tmp_path), "--kernels", "sampling", "--repeats", "1"])
    stored = json.loads((tmp_path / "kernel-speed.json").read_text())
    assert {time["kernel"] for time in stored["times"]} == {"sampling"}
