"""Whether a generator makes the tokens that a tokenizer decodes."""

from __future__ import annotations

from vistok.models.generators.base import Generator
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Layout


def check_fit(tokenizer: ImageTokenizer, generator: Generator) -> None:
    """Raises ValueError, with all reasons, unless `generator` makes tokens that `tokenizer` decodes.

    A generator is built for a vocabulary, a number of tokens and a layout, and fits every tokenizer that has the same.
    """
    if reasons := objections(tokenizer, generator):
        raise ValueError(
            f"{type(generator).__name__} does not fit {type(tokenizer).__name__}: {'; '.join(reasons)}"
        )


def objections(tokenizer: ImageTokenizer, generator: Generator) -> list[str]:
    """Why the two cannot be used together; empty when they can."""
    if (generator.codebook_size is None) != (tokenizer.codebook_size is None):
        kinds = {True: "continuous latents", False: "codebook indices"}
        return [
            f"it makes {kinds[generator.codebook_size is None]}, "
            f"the tokenizer decodes {kinds[tokenizer.codebook_size is None]}"
        ]
    reasons = [
        f"its {name} is {getattr(generator, name)} and not {getattr(tokenizer, name)}"
        for name in ("codebook_size", "num_tokens")
        if getattr(generator, name) != getattr(tokenizer, name)
    ]
    if generator.layout != tokenizer.layout:
        reasons.append(
            f"it makes tokens {_arrangement(generator.layout)}, the tokenizer decodes them {_arrangement(tokenizer.layout)}"
        )
    return reasons


def _arrangement(layout: Layout) -> str:
    if layout.scales is not None:
        return f"in scales of {layout}"
    return "in a sequence without rows and columns" if layout.grid is None else f"on a grid of {layout}"
