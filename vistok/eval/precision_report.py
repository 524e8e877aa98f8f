"""A measurement of precisions as a page."""

from __future__ import annotations

from vistok.eval.markdown import table
from vistok.eval.precision import REFERENCE, GeneratorEffect, PrecisionReport, TokenizerEffect

GENERATOR_COLUMNS = (
    "Precision",
    "Weights, MiB",
    "Divergence, nats per token",
    "Same most probable code",
    "Draws changed",
    "Tokens changed",
    "Images unchanged",
)
TOKENIZER_COLUMNS = (
    "Precision",
    "Weights, MiB",
    "PSNR, dB",
    "Largest difference of 255",
    "Tokens kept when encoding",
)


def page(report: PrecisionReport, picture: str) -> str:
    """The whole report in markdown; `picture` is the file name of the grid of images."""
    total = len(report.prompts) * report.num_images_per_prompt
    sampling = ", ".join(f"{name} {value}" for name, value in report.sampling.items() if value is not None)
    lines = [
        f"# Precision of {report.model}",
        "",
        f"Against {REFERENCE}. The generator:",
        "",
        *table(GENERATOR_COLUMNS, (_generator_cells(*item) for item in report.generator.items())),
        "",
        "The tokenizer:",
        "",
        *table(TOKENIZER_COLUMNS, (_tokenizer_cells(*item) for item in report.tokenizer.items())),
        "",
        f"![The same seeds in every precision, by row]({picture})",
        "",
        "- int8: weights of the linear layers in the blocks with one scale for each output channel, all else in the type "
        "that is named with it (`vistok/models/quantize.py`).",
        "- Divergence and most probable code: of the distribution of the next token, without guidance and truncation, "
        f"given the tokens that {REFERENCE} drew.",
        "- Draws changed: tokens that come out differently from the same seed, likewise given equal tokens before them, "
        f"with the settings of the sampling: {sampling}.",
        "- Tokens changed, images unchanged: whole images from the same seeds. Once a token differs, those behind it are "
        "drawn for another image; its quality need not be worse.",
        f"- PSNR: between 8-bit pictures decoded from the tokens that {REFERENCE} drew, of the mean squared error over all. "
        "Tokens kept: of these pictures encoded again, both from equal pictures.",
        f"- {total} images of {report.num_tokens} tokens: {len(report.prompts)} prompts with "
        f"{report.num_images_per_prompt} seeds each.",
        f"- Device {report.device}; torchao {report.torchao}; {report.machine}; vistok {report.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def _generator_cells(precision: str, effect: GeneratorEffect) -> list[str]:
    return [
        precision,
        f"{effect.weights_mib:.1f}",
        f"{effect.divergence:.1e}",
        _percent(effect.same_top),
        _percent(effect.changed_draws),
        _percent(effect.changed_tokens),
        _percent(effect.same_images),
    ]


def _tokenizer_cells(precision: str, effect: TokenizerEffect) -> list[str]:
    return [
        precision,
        f"{effect.weights_mib:.1f}",
        "same" if effect.psnr is None else f"{effect.psnr:.1f}",
        str(effect.largest),
        _percent(effect.kept_tokens),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
