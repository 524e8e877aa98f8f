"""Profiles at tiny sizes: which operator counts for which group, and that shares add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vistok.eval import profiles
from vistok.eval.operator_groups import (
    ATTENTION,
    CONVOLUTION,
    ELEMENTWISE,
    GROUPS,
    MATMUL,
    OVERHEAD,
    SAMPLING,
    OperatorTime,
    computing_calls,
    network_ranges,
    operator_times,
    shares,
)
from vistok.eval.profiles import Subject, main, measure
from vistok.models.generators.llamagen import LlamaGenClass

CPU = torch.device("cpu")
SIZES = {"codebook_size": 20, "num_tokens": 16, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2}
TINY = {"tiny": Subject("a tiny one", profiles._ordered(LlamaGenClass, SIZES | {"mlp_dim": 24}))}


class Network(nn.Module):
    """One operator of each group, all inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(2, 2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.linear(inputs).tanh()  # [4 8]
        heads = hidden[None, None]
        hidden = F.scaled_dot_product_attention(heads, heads, heads)[0, 0]
        return self.conv(hidden.reshape(1, 2, 4, 4)).mean() + hidden


def _groups(**kinds: str) -> dict[str, str]:
    return {f"aten::{name}": group for name, group in kinds.items()}


@torch.inference_mode()
def test_groups_of_operators() -> None:
    network, inputs = Network(), torch.ones(4, 8)
    network(inputs).topk(2)
    with network_ranges(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        network(inputs).topk(2)
    times = operator_times(recorded.events(), CPU)
    found = {time.name: time.group for time in times}
    expected = _groups(addmm=MATMUL, linear=MATMUL, conv2d=CONVOLUTION, tanh=ELEMENTWISE, topk=SAMPLING)
    assert expected.items() <= found.items()
    assert found["aten::scaled_dot_product_attention"] == ATTENTION
    assert {group for name, group in found.items() if "attention" in name} == {ATTENTION}
    assert not any(name == "vistok: network" for name in found)
    assert [time.seconds for time in times] == sorted((time.seconds for time in times), reverse=True)
    assert all(time.seconds >= 0 and time.calls >= 1 for time in times)


def test_only_the_outermost_module_opens_a_range() -> None:
    network = nn.Sequential(nn.Sequential(nn.Tanh()), nn.Tanh())
    with network_ranges(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        network(torch.ones(2))
        with pytest.raises(TypeError):
            network(None)  # closes its range all the same
        network(torch.ones(2))
    names = [event.name for event in recorded.events()]
    assert names.count("vistok: network") == 3 and names.count("aten::tanh") == 4
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        network(torch.ones(2))
    assert "vistok: network" not in [event.name for event in recorded.events()]


def test_what_no_operator_took_is_overhead() -> None:
    times = [OperatorTime("aten::mm", MATMUL, 2, 0.5), OperatorTime("aten::view", ELEMENTWISE, 3, 0.1)]
    split = shares(times, wall_seconds=1.0)
    assert split == pytest.approx(
        {**dict.fromkeys(GROUPS, 0.0), MATMUL: 0.5, ELEMENTWISE: 0.1, OVERHEAD: 0.4}
    )
    assert computing_calls(times) == 2
    assert shares(times, wall_seconds=0.3) == pytest.approx(
        {**dict.fromkeys(GROUPS, 0.0), MATMUL: 5 / 6, ELEMENTWISE: 1 / 6}
    )


class _Kernel:
    def __init__(self, name: str, duration: float) -> None:
        self.name, self.duration = name, duration


class _Event:
    """As much of an event of the profiler as is read, with the kernels that a GPU ran for it."""

    device_type = torch.autograd.DeviceType.CPU
    self_cpu_time_total = 1000.0

    def __init__(self, name: str, *kernels: _Kernel, parent: Any = None) -> None:
        self.name, self.kernels, self.cpu_parent = name, kernels, parent


def test_on_a_gpu_kernels_count() -> None:
    network = _Event("vistok: network", _Kernel("vistok: network", 99.0), _Kernel("_decode_attention", 5.0))
    linear = _Event("aten::linear", parent=network)
    events = [
        network,
        linear,
        _Event("aten::addmm", _Kernel("nvjet_hsh", 4.0), _Kernel("splitk_reduce", 2.0), parent=linear),
        _Event("aten::mul", _Kernel("elementwise", 3.0), parent=network),
        _Event("aten::sort", _Kernel("radix", 1.0)),
    ]
    times = operator_times(events, torch.device("cuda"))
    assert [(t.name, t.group, t.calls, round(1e6 * t.seconds)) for t in times] == [
        ("aten::addmm", MATMUL, 2, 6),
        ("_decode_attention", ATTENTION, 1, 5),
        ("aten::mul", ELEMENTWISE, 1, 3),
        ("aten::sort", SAMPLING, 1, 1),
    ]


def test_an_unknown_subject() -> None:
    with pytest.raises(ValueError, match="unknown subject 'var'; choose from llamagen-b, nar-b, xar-b"):
        measure("var", CPU, "float32")


def test_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiles, "SUBJECTS", TINY)
    main(["-o", str(tmp_path / "out"), "--subjects", "tiny", "--batch-sizes", "1", "2", "--repeats", "1"])
    stored = json.loads((tmp_path / "out" / "profiles.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    rows = [(p["subject"], p["dtype"], p["batch_size"]) for p in stored["profiles"]]
    assert rows == [("tiny", dtype, size) for dtype in ("float32", "bfloat16") for size in (1, 2)]
    page = (tmp_path / "out" / "report.md").read_text()
    for one in stored["profiles"]:
        assert sum(one["shares"].values()) == pytest.approx(1)
        assert one["shares"][MATMUL] > 0 and one["shares"][ATTENTION] > 0 and one["shares"][SAMPLING] > 0
        assert one["calls"] > 16 * 2 * 7  # at least the matrix products of every step
        assert (
            f"| tiny | {one['dtype']} | {one['batch_size']} | {one['seconds']:.3g} | {one['calls']} |" in page
        )
    assert (tmp_path / "out" / "profiles.png").read_bytes().startswith(b"\x89PNG")
    assert "a tiny one" in page and stored["machine"] in page
