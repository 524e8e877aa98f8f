"""Settings of torch's compiler, for all that this package compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

MOST_PROGRAMS = 64  # of one function: batch sizes, lengths of caches, tokens per step


@contextlib.contextmanager
def compiler_settings(*, packs_weights: bool) -> Iterator[None]:
    """For calls that may compile.

    Args:
        packs_weights: copy the weights into the program as a CPU's matrix products want them ("freezing"), so that
            what is changed in them later has no effect.
    """
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._inductor.config.patch(freezing=packs_weights),
        torch._dynamo.config.patch(recompile_limit=MOST_PROGRAMS),
    ):
        yield
