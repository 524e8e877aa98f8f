"""Whether a generator makes the tokens that a tokenizer decodes."""

from __future__ import annotations

from vistok.models.generators.base import Generator
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Layout

# What generators and tokenizers of continuous tokens call the same facts.
LATENTS = {"latent_dim": "latent_channels", "latent_scale": "scaling_factor"}


def check_fit(tokenizer: ImageTokenizer, generator: Generator) -> None:
    """Raises ValueError, with all reasons, unless `generator` makes tokens that `tokenizer` decodes.

    A generator is built for a vocabulary, or for the channels and the scale of latents, for a number of tokens and a
    layout, and fits every tokenizer that has the same.
    """
    if reasons := objections(tokenizer, generator):
        raise ValueError(
            f"{type(generator).__name__} does not fit {type(tokenizer).__name__}: {'; '.join(reasons)}"
        )


def objections(tokenizer: ImageTokenizer, generator: Generator) -> list[str]:
    """Why the two cannot be used together; empty when they can."""
    reasons = _about_a_token(tokenizer, generator)
    if generator.num_tokens != tokenizer.num_tokens:
        reasons.append(f"its num_tokens is {generator.num_tokens} and not {tokenizer.num_tokens}")
    if generator.layout != tokenizer.layout:
        reasons.append(
            f"it makes tokens {_arrangement(generator.layout)}, the tokenizer decodes them {_arrangement(tokenizer.layout)}"
        )
    return reasons


def _about_a_token(tokenizer: ImageTokenizer, generator: Generator) -> list[str]:
    """Why a single token of the one is none of the other."""
    if (generator.codebook_size is None) != (tokenizer.codebook_size is None):
        kinds = {True: "continuous latents", False: "codebook indices"}
        return [
            f"it makes {kinds[generator.codebook_size is None]}, "
            f"the tokenizer decodes {kinds[tokenizer.codebook_size is None]}"
        ]
    if generator.codebook_size != tokenizer.codebook_size:
        return [f"its codebook_size is {generator.codebook_size} and not {tokenizer.codebook_size}"]
    return _about_latents(tokenizer, generator) if generator.codebook_size is None else []


def _about_latents(tokenizer: ImageTokenizer, generator: Generator) -> list[str]:
    reasons = []
    for name, of_tokenizer in LATENTS.items():
        mine, its = getattr(generator, name, None), getattr(tokenizer, of_tokenizer, None)
        if mine != its and its is not None:  # a tokenizer need not say which scale suits its latents
            reasons.append(f"its {name} is {mine} and the tokenizer's {of_tokenizer} {its}")
    return reasons


def _arrangement(layout: Layout) -> str:
    if layout.scales is not None:
        return f"in scales of {layout}"
    return "in a sequence without rows and columns" if layout.grid is None else f"on a grid of {layout}"
