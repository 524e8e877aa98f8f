"""Pipelines whose models run compiled."""

from __future__ import annotations

from typing import Any

from vistok.decoding.compiled import CompiledGenerator
from vistok.models.compiling import CompiledModel, compile_model
from vistok.models.generators.base import Generator, OrderedGenerator
from vistok.pipelines.offload import Offloading


class Compilation(Offloading):
    """What a pipeline offers for compiling its generator."""

    transformer: Generator
    _compiled: CompiledGenerator | CompiledModel | None = None

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
        model = self.transformer
        if self._compiled is None or self._compiled.model is not model:
            if isinstance(model, OrderedGenerator):
                self._compiled = CompiledGenerator(model)
            else:
                self._compiled = compile_model(model)

    def compiled(self, model: Generator) -> Any:
        """What runs the compiled steps of `model`, if it is the generator that was compiled; else `model` itself."""
        compiled = self._compiled
        return compiled if isinstance(compiled, CompiledGenerator) and compiled.model is model else model
