"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "emoji-64"
MAX_SEED = 2**63 - 1
DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[
    str, typer.Option(help="A name from `vistok models`, a folder, a file or a hub id.", metavar="NAME")
]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="A picture file; or a folder (existing, or ending with /) for one PNG each.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Image j of every prompt uses seed + j.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="int8: weights of the generator in 8 bits, for less memory; needs torchao. [default: none]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")]


def choose_device(name: str) -> str:
    """The device called `name`; `"auto"` is the fastest one here.

    Raises:
        ValueError: an unknown device, or one that this machine does not have.
    """
    available = available_devices()
    if name == "auto":
        return available[0]
    if name not in available:
        raise ValueError(f"device {name!r} is not available here; choose one of auto, {', '.join(available)}")
    return name


def available_devices() -> list[str]:
    """What torch can compute on here, the fastest first."""
    import torch

    accelerators = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [*(name for name, is_available in accelerators.items() if is_available), "cpu"]


def choose_dtype(name: str) -> torch.dtype:
    """The torch type called `name`, one of DTYPES.

    Raises:
        ValueError: another name.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)
