"""Reading a published weights file without running anything that is in it."""

from __future__ import annotations

import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; safetensors files begin with the length of their header, at most this
# Names under which training scripts save the state dict of a model.
WRAPPERS = ("model", "module", "state_dict")
AVERAGED = "model_ema"  # of MAR and xAR: the weights that their samplers read, beside those of the last step


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """Tensors by published key, on the CPU, of a `.safetensors` file or a pickle.

    The kind of file is told from its content, not from its name. A pickle is the state dict itself, or a training
    checkpoint with the state dict under one of the names of `WRAPPERS`. What lies beside it there (optimizer,
    discriminator, arguments, and the moving average `ema`) is left out. LlamaGen's samplers read `model` as well, while
    its scripts that measure reconstructions would prefer `ema` where there is one. A state dict under `AVERAGED` comes
    before the others, as in the samplers of MAR.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or truncated file, an HTML page saved as a checkpoint, a pickle with code inside (which is
            refused, not run), or no flat dictionary of tensors in it, or more than one under the names of `WRAPPERS`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty; download it again")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page, not a checkpoint; download the file itself (the raw link)")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    return _read_pickle(path) if _is_pickle(start) else _read_safetensors(path)


def read_metadata(path: Path | str) -> dict[str, str]:
    """What the header of a `.safetensors` file says besides its tensors, as text; empty for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _is_pickle(start: bytes) -> bool:
    """Whether a file starts like a zip of torch.save, or like a bare pickle and not like a safetensors header."""
    header_length = int.from_bytes(start[:8], "little")
    return start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and header_length > MAX_HEADER)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about pickle protocols and TorchScript; the error below says enough
            # Training scripts save their arguments beside the weights: a plain bag of attributes without any code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds Python objects or code besides tensors; it was refused and nothing in it was run"
        ) from None
    except Exception as error:  # a damaged pickle can fail anywhere, with any exception
        raise _damaged(path, error) from None
    return _state_dict(content, path)


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{path} is truncated, damaged or not a checkpoint ({reason}); download it again")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    names = (AVERAGED,) if AVERAGED in content else WRAPPERS
    wrappers = [name for name in names if name in content and not isinstance(content[name], Tensor)]
    if len(wrappers) > 1:
        raise ValueError(
            f"{path} wraps a state dict under each of {', '.join(wrappers)}; save the one you mean alone"
        )
    place = f"{path} under {wrappers[0]!r}" if wrappers else str(path)
    return _flat(content[wrappers[0]] if wrappers else content, place)


def _flat(content: Any, place: str) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        what = "an empty dictionary" if content == {} else f"a {type(content).__name__}"
        raise ValueError(f"{place} holds {what}, not a dictionary of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{place} is not a flat dictionary of tensors: {key!r} holds a {type(value).__name__}; "
                f"only a state dict under one of {', '.join(WRAPPERS)} is found by itself, save any other alone"
            )
    return dict(content)
