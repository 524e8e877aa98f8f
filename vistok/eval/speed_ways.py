"""The ways to draw that `vistok.eval.speed` times, and the types of weights, with what each of them needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vistok.decoding.compiled import CompiledGenerator
from vistok.eval.speed_subjects import Subject
from vistok.models.compiling import CompiledModel, compile_model
from vistok.models.generators.base import OrderedGenerator
from vistok.models.quantize import quantize_weights

FLOAT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPES = (*FLOAT_TYPES, "int8")  # in the order in which a model goes through them
PLAIN, PLAIN_DTYPE = "plain", "float32"  # what all else is compared with


class UnavailableError(Exception):
    """A way or a type that a family does not have here; the message is the reason."""


def convert(subject: Subject, dtype: str) -> None:
    """Change the weights of a subject, from those of an earlier type of `DTYPES`, in place.

    Raises:
        UnavailableError: it cannot have them here.
    """
    subject.model.to(FLOAT_TYPES.get(dtype, torch.bfloat16))
    if dtype not in FLOAT_TYPES:
        try:
            quantize_weights(subject.model, dtype)
        except (ModuleNotFoundError, ValueError) as error:
            raise UnavailableError(str(error)) from error


def _eager(subject: Subject) -> Any:
    return subject.model


def _compiled(subject: Subject) -> Any:
    """Steps apart from the model, or the model itself, compiled until `finish` takes it back."""
    model = subject.model
    try:
        return CompiledGenerator(model) if isinstance(model, OrderedGenerator) else compile_model(model)
    except ValueError as error:
        raise UnavailableError(str(error)) from error


def drawn_with(subject: Subject, made: Any) -> Any:
    """What `Subject.draw` takes, of what a way has made."""
    return subject.model if isinstance(made, CompiledModel) else made


def finish(made: Any) -> None:
    """Take back what a way has done to the model of a subject."""
    if isinstance(made, CompiledModel):
        made.undo()


WAYS: dict[str, Callable[[Subject], Any]] = {  # name -> what `drawn_with` and `finish` take
    "eager": _eager,
    "compiled": _compiled,
}
