"""How a generator is sampled, by its kind: the settings of a pipeline's preset and of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, make_guidance
from vistok.decoding.masked import MaskedSamplingParams
from vistok.decoding.sampling import SamplingParams
from vistok.models.generators.base import Generator, MaskedGenerator


@dataclass(frozen=True)
class OrderedSettings:
    """Of a next-token generator: `ConstantGuidance` and `SamplingParams`.

    Raises:
        ValueError: a value outside its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _ = self.sampling

    @property
    def sampling(self) -> SamplingParams:
        """How a token is drawn."""
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def guidance(self) -> GuidanceSchedule:
        """The scale at every step."""
        return ConstantGuidance(self.guidance_scale)


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


Settings = OrderedSettings | MaskedSettings
KINDS: tuple[type[Settings], ...] = (OrderedSettings, MaskedSettings)
ALL_SETTINGS = tuple(dict.fromkeys(field.name for kind in KINDS for field in fields(kind)))


def settings_for(transformer: Generator, given: Mapping[str, Any]) -> Settings:
    """The settings of a generator: those `given`, where they are not `None`, and otherwise our defaults.

    Raises:
        ValueError: one that this kind of generator does not have, or a value outside its range.
    """
    kind = MaskedSettings if isinstance(transformer, MaskedGenerator) else OrderedSettings
    return override(kind(), given, type(transformer).__name__)


def override(preset: Settings, given: Mapping[str, Any], generator: str) -> Settings:
    """`preset` with the settings `given` that are not `None`; raises as `settings_for` does."""
    chosen = {name: value for name, value in given.items() if value is not None}
    known = asdict(preset)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{name} is not a setting of a {generator}; it has {', '.join(known)}")
    return replace(preset, **chosen)
