"""How a generator is sampled, by its kind: the settings of a pipeline's preset and of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vistok.decoding.guidance import (
    ConstantGuidance,
    GuidanceSchedule,
    StepsGuidance,
    check_guidance_scale,
    make_guidance,
)
from vistok.decoding.masked import MaskedSamplingParams
from vistok.decoding.sampling import SamplingParams
from vistok.models.generators.base import Generator, MaskedGenerator, OrderedGenerator
from vistok.order import Order


@dataclass(frozen=True)
class OrderedSettings:
    """Of a generator with a fixed order: guidance and `SamplingParams`.

    Args:
        guidance_scale: classifier-free guidance; at least 1, which is off.
        guidance_tokens: guide a step only while at most so many tokens were decided before it; `None` guides all.
            The published "cfg interval" c of LlamaGen counts steps after the first, so that c + 1 is meant here; that
            of NAR is c itself.
        temperature, top_k, top_p, typical_p: see `SamplingParams`.

    Raises:
        ValueError: a value outside its range.
    """

    guidance_scale: float = 1.0
    guidance_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        check_guidance_scale(self.guidance_scale)
        if self.guidance_tokens is not None and self.guidance_tokens < 0:
            raise ValueError(
                f"guidance_tokens must be at least 0, got {self.guidance_tokens}; leave it out to guide all tokens"
            )
        _ = self.sampling

    @property
    def sampling(self) -> SamplingParams:
        """How a token is drawn."""
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.typical_p)

    def guidance(self, order: Order) -> GuidanceSchedule:
        """The scale at every step of `order`."""
        if self.guidance_tokens is None:
            return ConstantGuidance(self.guidance_scale)
        return StepsGuidance(self.guidance_scale, order.num_steps_within(self.guidance_tokens))

    def check_vocabulary(self, codebook_size: int) -> None:
        """Raises ValueError when a generator with so many codes cannot be sampled so."""
        self.sampling.check_vocabulary(codebook_size)


@dataclass(frozen=True)
class MaskedSettings:
    """Of a masked generator: `MaskedSamplingParams`, and `make_guidance` with its schedule and power.

    Raises:
        ValueError: a value outside its range, or an unknown schedule.
    """

    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 3.0
    choice_temperature: float = 4.5
    softmax_annealing: bool = False

    def __post_init__(self) -> None:
        _ = self.sampling, self.guidance

    @property
    def sampling(self) -> MaskedSamplingParams:
        """Steps and noise."""
        return MaskedSamplingParams(self.num_inference_steps, self.choice_temperature, self.softmax_annealing)

    @property
    def guidance(self) -> GuidanceSchedule:
        """The scale at every step."""
        return make_guidance(self.guidance_schedule, self.guidance_scale, self.guidance_power)

    def check_vocabulary(self, codebook_size: int) -> None:
        """Nothing here depends on the number of codes."""


Settings = OrderedSettings | MaskedSettings
KINDS: dict[type[Generator], type[Settings]] = {
    OrderedGenerator: OrderedSettings,
    MaskedGenerator: MaskedSettings,
}
ALL_SETTINGS = tuple(dict.fromkeys(field.name for kind in KINDS.values() for field in fields(kind)))


def settings_for(transformer: Generator, given: Mapping[str, Any]) -> Settings:
    """The settings of a generator: those `given`, where they are not `None`, and otherwise our defaults.

    Raises:
        ValueError: one that this kind of generator does not have, a value outside its range, or a generator of another
            kind.
    """
    for kind, settings in KINDS.items():
        if isinstance(transformer, kind):
            return override(settings(), given, transformer)
    kinds = " nor of ".join(kind.__name__ for kind in KINDS)
    raise ValueError(f"{type(transformer).__name__} is neither of the kind {kinds}: no pipeline samples it")


def override(preset: Settings, given: Mapping[str, Any], transformer: Generator) -> Settings:
    """`preset` with the settings `given` that are not `None`; raises as `settings_for` does."""
    chosen = {name: value for name, value in given.items() if value is not None}
    known = asdict(preset)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"{name} is not a setting of a {type(transformer).__name__}; it has {', '.join(known)}"
            )
    settings = replace(preset, **chosen)
    settings.check_vocabulary(transformer.codebook_size)
    return settings
