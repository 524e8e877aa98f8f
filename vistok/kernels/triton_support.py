"""Where Triton kernels can run: on CUDA, and anywhere in Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def is_interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which is slow and meant for tests: `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def triton_objections(device: torch.device) -> list[str]:
    """Reasons why no Triton kernel can run on tensors of this device; empty when one can."""
    if find_spec("triton") is None:
        return ["Triton is not installed (pip install triton; Linux only)"]
    if device.type != "cuda" and not is_interpreting():
        return [f"needs CUDA tensors, got {device.type} (TRITON_INTERPRET=1 runs it slowly anywhere)"]
    return []
