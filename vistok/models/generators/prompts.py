"""What a user is told when a model reads only the beginning of a prompt."""

from __future__ import annotations

import warnings

SHOWN_WORDS = 3


def warn_of_cut(kept: str, size: int, limit: int, unit: str) -> None:
    """Warn that of a prompt of `size` units only the first `limit`, which say `kept`, are read."""
    words = kept.split()
    end = " ".join(words[-SHOWN_WORDS:])
    shown = f"...{end}" if len(words) > SHOWN_WORDS else end
    warnings.warn(
        f"the prompt has {size} {unit} and this model reads {limit}: it was cut after {shown!r}", stacklevel=3
    )
