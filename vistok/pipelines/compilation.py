"""Pipelines whose models run compiled."""

from __future__ import annotations

from typing import Any

from vistok.decoding.compiled import CompiledGenerator
from vistok.models.generators.base import Generator, OrderedGenerator
from vistok.pipelines.offload import Offloading


class Compilation(Offloading):
    """What a pipeline offers for compiling its generator."""

    transformer: Generator
    _compiled: CompiledGenerator | None = None

    def compile(self) -> None:
        """Compile what drawing runs again and again; for a pipeline that is where, and as precise as, it will run.

        The first call of a kind (number of images, guided or not) compiles, which takes from seconds to a minute, and
        the later ones reuse that. Plain decoding runs compiled; speculative decoding, and orders made for given tokens,
        run as before. On a CPU the generator's weights are copied, so that it must not be changed afterwards.

        Raises:
            ValueError: this generator cannot be compiled, or it is offloaded.
        """
        if self.is_offloading:
            raise ValueError(
                "a generator that is offloaded cannot be compiled: its weights move; leave one of the two out"
            )
        if isinstance(self.transformer, OrderedGenerator):
            self._compiled = CompiledGenerator(self.transformer)
        else:
            from vistok.models.compiling import compile_model  # TEMP

            compile_model(self.transformer)

    def compiled(self, model: Generator) -> Any:
        """The compiled form of `model`, if that is what was compiled; else `model` itself."""
        compiled = self._compiled
        return model if compiled is None or compiled.model is not model else compiled
