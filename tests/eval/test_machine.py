"""The machine in words."""

from __future__ import annotations

import platform

import torch

from vistok.eval import machine


def test_description_names_hardware_and_versions_but_no_host(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Imaginary  CPU 9000\n")
    monkeypatch.setattr(machine, "CPU_INFO", info)
    found = machine.describe_machine()
    assert found.cpu == "Imaginary CPU 9000" and found.cores >= 1
    assert found.torch == torch.__version__ and found.python == platform.python_version()
    assert str(found).startswith("Imaginary CPU 9000 (") and "torch" in str(found)
    assert platform.node() not in str(found)


def test_cpu_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "missing")
    assert machine.describe_machine().cpu
