"""Models that wait on the CPU while another computes: diffusers' `enable_model_cpu_offload` for our pipelines.

Its hooks bring a model to the accelerator when `forward` is called. A generator here is called step by step, a tokenizer
by `decode`, so a pipeline brings them itself, at the beginning of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Offloading:
    """What a diffusers pipeline needs beside `model_cpu_offload_seq`."""

    _all_hooks: list[Any]  # of diffusers, which removes and renews them
    _execution_device: Any

    @property
    def is_offloading(self) -> bool:
        """Whether models wait on the CPU."""
        return bool(getattr(self, "_all_hooks", None))

    @contextmanager
    def visit(self, encoder: Any) -> Iterator[None]:
        """A text encoder, which is no part of the pipeline, on the device that computes; where models are offloaded."""
        moves = self.is_offloading and hasattr(encoder, "to")
        if moves:
            encoder.to(self._execution_device)
        try:
            yield
        finally:
            if moves:
                encoder.to("cpu")

    def enable_model_cpu_offload(self, *args: Any, **options: Any) -> None:
        """As diffusers'; see `DiffusionPipeline`.

        Raises:
            ValueError: the generator is compiled for weights that stay where they are.
        """
        if getattr(self, "_compiled", None) is not None:
            raise ValueError(
                "a compiled generator cannot be offloaded: load the pipeline again, or leave out compile()"
            )
        super().enable_model_cpu_offload(*args, **options)  # type: ignore[misc]  # that of DiffusionPipeline

    def enable_sequential_cpu_offload(self, *args: Any, **options: Any) -> NoReturn:
        """Not possible; see the error."""
        raise ValueError(
            f"{type(self).__name__} cannot offload layer by layer: every step of a generator reads all its weights, which "
            "would go to the accelerator once per token; use enable_model_cpu_offload, or int8 weights (quantize_weights)"
        )


def onload(model: Any) -> None:
    """Bring a model to the device it computes on, and those that wait for it off; nothing where none is offloaded."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)
