"""Speculative decoding in a pipeline: a drafter and a rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from vistok.decoding.speculative.accept import AcceptRule
from vistok.decoding.speculative.drafter import Drafter
from vistok.decoding.speculative.generate import Speculation, generate_speculative
from vistok.decoding.speculative.lantern import LanternRule
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.strict import StrictRule
from vistok.decoding.speculative.tree_drafting import is_greedy
from vistok.models.generators.base import Generator, NextTokenGenerator
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.drawing import Request
from vistok.pipelines.settings import OrderedSettings, Settings

RULES = ("strict", "lantern")
LANTERN_K, LANTERN_DELTA = 100, 0.1


@dataclass(frozen=True)
class SpeculativeDecoding:
    """How a next-token generator is sped up.

    Args:
        drafter: proposes tokens.
        rule: decides which are kept; with a lossless one the images follow the same distribution as without. For greedy
            decoding (`top_k` 1) a `LanternRule` is exchanged for its greedy one.
    """

    drafter: Drafter
    rule: AcceptRule = field(default_factory=StrictRule)


def check_speculation(
    model: Generator,
    *,
    has_given: bool = False,
    has_processor: bool = False,
    has_preview: bool = False,
    is_offloading: bool = False,
) -> None:
    """Raises ValueError when a call asks for what only plain decoding does."""
    if not isinstance(model, NextTokenGenerator):
        raise ValueError(
            f"{type(model).__name__} does not decide one token after the other: there is nothing to speculate about"
        )
    wishes = {
        "tokens and keep": has_given,
        "a logits_processor or watermark": has_processor,
        "previews": has_preview,
        "models that are offloaded, of which a drafter is none": is_offloading,
    }
    for wish, is_there in wishes.items():
        if is_there:
            raise ValueError(f"speculative decoding does not support {wish}; decode plainly")


def speculate(
    model: Generator, settings: Settings, request: Request, decoding: SpeculativeDecoding
) -> Speculation:
    """As `drawing.draw`, with a drafter.

    Raises:
        ValueError: a drafter that does not fit, or a null condition that changes after the first token.
    """
    assert isinstance(model, NextTokenGenerator) and isinstance(settings, OrderedSettings)
    if request.conditions.later_null is not None:
        raise ValueError(
            "null_class changes what speculative decoding guides away from after the first token; use negative_class, or "
            "decode plainly"
        )
    rule = decoding.rule
    if isinstance(rule, LanternRule) and is_greedy(settings.sampling):
        rule = rule.greedy()
    return generate_speculative(
        model,
        request.conditions.rows,
        drafter=decoding.drafter,
        rule=rule,
        streams=request.streams,
        num_tokens=request.lengths,
        sampling=settings.sampling,
        guidance=settings.guidance(model.order),
        null_condition=request.conditions.null,
        on_step=request.on_step,
    )


def make_rule(
    accept: str, tokenizer: ImageTokenizer, *, k: int | None = None, delta: float | None = None
) -> AcceptRule:
    """A rule by name.

    Args:
        accept: `"strict"`, which is lossless, or `"lantern"`, which is not.
        tokenizer: its codebook says which codes are near each other.
        k, delta: of LANTERN, see `LanternRule`.

    Raises:
        ValueError: an unknown name, `k` or `delta` with another rule or out of range, or a tokenizer without codebook.
    """
    if accept not in RULES:
        raise ValueError(f"unknown rule {accept!r}; choose one of {', '.join(RULES)}")
    if accept == "strict":
        if k is not None or delta is not None:
            raise ValueError("k and delta are of the rule 'lantern'; 'strict' takes neither")
        return StrictRule()
    k, delta = LANTERN_K if k is None else k, LANTERN_DELTA if delta is None else delta
    codebook = tokenizer.codebook
    if not 0 <= k < len(codebook):
        raise ValueError(f"k must be in 0..{len(codebook) - 1}, the other codes of the codebook; got {k}")
    return LanternRule(NeighbourTable.of(codebook, k).to(codebook.device), k, delta)
