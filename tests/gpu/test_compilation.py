"""Our kernels compile for Ampere and Hopper, also where there is no GPU: the interpreter does not see what a compiler does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHARED_MEMORY = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes that a block can have at most; CUDA C++ programming guide
KERNELS = {
    "_forward",
    "_backward_queries",
    "_backward_keys",
    "_attend_kernel",
    "_join_kernel",
    "_sample_kernel",
    "_verify_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """In a process of its own, as this one may have the interpreter in place of the compiler."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile_kernels", str(capability)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[capability]] == []
