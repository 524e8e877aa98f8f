"""How a generator is sampled, by its kind: the settings of a pipeline's preset and of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.guidance import (
    ConstantGuidance,
    GuidanceSchedule,
    StepsGuidance,
    check_guidance_scale,
    make_guidance,
)
from vistok.decoding.mar_sampling import hidden_counts
from vistok.decoding.masked import MaskedSamplingParams
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.step_schedules import annealed_steps
from vistok.models.generators.base import Generator, MaskedGenerator, OrderedGenerator
from vistok.models.generators.mar import MAR
from vistok.models.generators.xar import XAR
from vistok.models.heads.diffusion import NUM_TIMESTEPS, DiffusionHead
from vistok.models.heads.flow import Euler, EulerMaruyama, FlowHead, Integrator
from vistok.order import Order

INTEGRATORS: dict[str, Integrator] = {"sde": EulerMaruyama(), "ode": Euler()}
MAR_STEPS = 64  # where nothing else is said: of the authors' demo and of DiSA
ANNEALED_LAST_TIMESTEP = 950  # as published with DiSA


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
                f"guidance_tokens must be at least 0, got {self.guidance_tokens}; the number of tokens guides all of them"
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

    def fitted(self, generator: Generator) -> OrderedSettings:
        """These settings for one generator; raises ValueError when it cannot be sampled so."""
        self.sampling.check_vocabulary(generator.codebook_size)
        return self


@dataclass(frozen=True)
class ScheduledGuidance:
    """Guidance by the name of its schedule, see `make_guidance`.

    Raises:
        ValueError: a scale below 1, which is off, or an unknown schedule.
    """

    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 3.0

    def __post_init__(self) -> None:
        _ = self.guidance

    @property
    def guidance(self) -> GuidanceSchedule:
        """The scale at every step."""
        return make_guidance(self.guidance_schedule, self.guidance_scale, self.guidance_power)


@dataclass(frozen=True)
class ReuseSettings:
    """Context reuse by numbers, see `ContextReuse`; a period of 1 is off."""

    reuse_period: int = 1
    reuse_warm_up: int = 0

    @property
    def reuse(self) -> ContextReuse:
        """Which steps reuse features of the context; raises ValueError where a number is outside its range."""
        return ContextReuse(self.reuse_period, self.reuse_warm_up)


@dataclass(frozen=True)
class MaskedSettings(ReuseSettings, ScheduledGuidance):
    """Of a masked generator: `MaskedSamplingParams`, guidance, context reuse.

    Args:
        num_inference_steps, choice_temperature, softmax_annealing: see `MaskedSamplingParams`.
        reuse_period, reuse_warm_up: see `ContextReuse`; a period of 1 is off.

    Raises:
        ValueError: a value outside its range, or an unknown schedule.
    """

    num_inference_steps: int = 8
    choice_temperature: float = 4.5
    softmax_annealing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.sampling, self.reuse

    @property
    def sampling(self) -> MaskedSamplingParams:
        """Steps and noise."""
        return MaskedSamplingParams(self.num_inference_steps, self.choice_temperature, self.softmax_annealing)

    def fitted(self, generator: Generator) -> MaskedSettings:
        """These settings, which any masked generator can be sampled with."""
        return self


@dataclass(frozen=True)
class DenoisingSettings(ScheduledGuidance):
    """What generators of continuous tokens have in common: so many denoising steps within every step.

    Args:
        num_inference_steps: denoising steps within each step of the generator, or within the first.
        num_final_inference_steps: fewer within the last one, and linearly fewer from one to the next in between (DiSA,
            see `annealed_steps`); `None`: the same number within all.

    Raises:
        ValueError: a value outside its range, or an unknown schedule.
    """

    num_inference_steps: int = 50
    num_final_inference_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        final = self.num_final_inference_steps
        if final is not None and not 1 <= final <= self.num_inference_steps:
            raise ValueError(
                f"num_final_inference_steps must be in 1..{self.num_inference_steps}, which is num_inference_steps; "
                f"got {final}"
            )

    @property
    def extremes(self) -> tuple[int, int]:
        """Denoising steps within the first and within the last step."""
        final = self.num_final_inference_steps
        return self.num_inference_steps, self.num_inference_steps if final is None else final

    def denoising_steps(self, num_steps: int) -> tuple[int, ...]:
        """Denoising steps within each of `num_steps` steps of the generator."""
        return annealed_steps(num_steps, *self.extremes)


@dataclass(frozen=True)
class FlowSettings(DenoisingSettings):
    """Of a generator that follows a velocity (xAR): denoising steps, guidance and integrator.

    Args:
        num_inference_steps, num_final_inference_steps: see `DenoisingSettings`; at least 3 for `"sde"`.
        integrator: `"sde"`, with noise on the way (`EulerMaruyama`), or `"ode"`, without (`Euler`).

    Raises:
        ValueError: a value outside its range, an unknown schedule or integrator.
    """

    integrator: str = "sde"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.integrator not in INTEGRATORS:
            raise ValueError(
                f"unknown integrator {self.integrator!r}; choose one of {', '.join(INTEGRATORS)}"
            )
        for count in self.extremes:
            self.head.integrator.times(count)  # raises where there are too few

    @property
    def head(self) -> FlowHead:
        """How a velocity becomes tokens."""
        return FlowHead(INTEGRATORS[self.integrator])

    def fitted(self, generator: Generator) -> FlowSettings:
        """These settings, which any such generator can be sampled with."""
        return self


@dataclass(frozen=True)
class DiffusionSettings(ReuseSettings, DenoisingSettings):
    """Of a masked generator that draws tokens by diffusion (MAR): steps, guidance, temperature, context reuse.

    Args:
        num_inference_steps, num_final_inference_steps: see `DenoisingSettings`; 2 to 1000.
        num_steps: steps over all tokens, each of which decides some; `None`: 64, or one per token if these are fewer.
        temperature: of the denoising steps, see `DiffusionHead`.
        last_timestep: where chains of denoising steps begin; `None`: 999, or 950 where `num_final_inference_steps`
            anneals them, both as published.
        reuse_period, reuse_warm_up: see `ContextReuse`; a period of 1 is off.

    Raises:
        ValueError: a value outside its range, or an unknown schedule.
    """

    num_inference_steps: int = 100
    num_steps: int | None = None
    temperature: float = 1.0
    last_timestep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.reuse
        for count in self.extremes:
            self.head.chain(count)  # raises where there are too few or too many

    @property
    def head(self) -> DiffusionHead:
        """How noise becomes tokens."""
        first, last = self.extremes
        default = ANNEALED_LAST_TIMESTEP if last < first else NUM_TIMESTEPS - 1
        return DiffusionHead(self.temperature, default if self.last_timestep is None else self.last_timestep)

    def fitted(self, generator: Generator) -> DiffusionSettings:
        """These settings, `num_steps` filled in; raises ValueError when there are fewer tokens than steps."""
        steps = min(MAR_STEPS, generator.num_tokens) if self.num_steps is None else self.num_steps
        hidden_counts(generator.num_tokens, steps)
        return replace(self, num_steps=steps)


Settings = OrderedSettings | MaskedSettings | FlowSettings | DiffusionSettings
KINDS: dict[type[Generator], type[Settings]] = {
    OrderedGenerator: OrderedSettings,
    MaskedGenerator: MaskedSettings,
    XAR: FlowSettings,
    MAR: DiffusionSettings,
}
ALL_SETTINGS = tuple(dict.fromkeys(field.name for kind in KINDS.values() for field in fields(kind)))


def settings_for(transformer: Generator, given: Mapping[str, Any]) -> Settings:
    """The settings of a generator: those `given`, where they are not `None`, and otherwise our defaults.

    Raises:
        ValueError: one that this kind of generator does not have, a value outside its range, or a generator of another
            kind.
    """
    return override(settings_kind(type(transformer))(), given, transformer)


def settings_kind(model_class: type) -> type[Settings]:
    """The settings of a family of generators; raises ValueError for one of another kind."""
    for kind, settings in KINDS.items():
        if issubclass(model_class, kind):
            return settings
    kinds = " nor of ".join(kind.__name__ for kind in KINDS)
    raise ValueError(f"{model_class.__name__} is neither of the kind {kinds}: no pipeline samples it")


def override(preset: Settings, given: Mapping[str, Any], transformer: Generator) -> Settings:
    """`preset` with the settings `given` that are not `None`; raises as `settings_for` does."""
    chosen = {name: value for name, value in given.items() if value is not None}
    known = asdict(preset)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"{name} is not a setting of a {type(transformer).__name__}; it has {', '.join(known)}"
            )
    return replace(preset, **chosen).fitted(transformer)
