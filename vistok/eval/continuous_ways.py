"""The continuous generators that `continuous_speed` times, and the ways to draw from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vistok.decoding.context_reuse import ContextReuse
from vistok.decoding.flow_sampling import generate_flow
from vistok.decoding.guidance import LinearGuidance, RampGuidance
from vistok.decoding.mar_sampling import generate_mar
from vistok.decoding.speculative.continuous import generate_speculative
from vistok.decoding.step_schedules import annealed_steps
from vistok.decoding.streams import ImageStreams
from vistok.eval.plain_continuous import PlainMAR, plain_flow
from vistok.eval.random_weights import randomize
from vistok.models.generators import mar, xar
from vistok.models.generators.mar import MAR
from vistok.models.generators.xar import XAR
from vistok.models.heads.diffusion import DiffusionHead
from vistok.tokens import Tokens

DISA_LAST_TIMESTEP = 950
DRAFT: dict[str, Any] = {"dim": 384, "encoder_depth": 6, "decoder_depth": 6, "num_heads": 6, "mlp_dim": 1536}
DRAFT |= {"denoiser_dim": 512, "denoiser_depth": 3}
PARTS = ("encoder", "decoder", "head")
PLAIN, PUBLISHED = "plain", "plain, published steps"  # names of ways

Draw = Callable[[Tensor, ImageStreams], Tokens | Tensor]
Methods = list[tuple[object, str]]  # objects and the names of methods of theirs


@dataclass(frozen=True)
class Way:
    """One way to draw images.

    Args:
        name: as reported.
        steps: how many, as reported.
        draw: an image per label and stream.
        parts: the methods that are encoder, decoder and head, as `PARTS`.
        every: `draw` does one in so many of its steps, spread evenly.
    """

    name: str
    steps: str
    draw: Draw
    parts: tuple[Methods, Methods, Methods]
    every: int = 1


class Family(Protocol):
    """A generator with the ways to draw from it."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By the names under which their sizes are reported."""
        ...

    def ways(self) -> list[Way]:
        """As the package draws, and then with what makes it faster."""
        ...

    def plain_ways(self, every: int) -> list[Way]:
        """Nothing kept; the first with the steps of `ways`, of which it does one in `every`."""
        ...

    def with_few_steps(self) -> Family:
        """The same at little effort."""
        ...


@dataclass(frozen=True)
class XARFamily:
    """xAR; the defaults are published for xAR-B.

    Args:
        model: the generator.
        num_inference_steps: flow steps per cell.
        annealed: flow steps of DiSA at the first cell and at the last.
        scale: of the guidance.
    """

    model: XAR
    num_inference_steps: int = 40
    annealed: tuple[int, int] = (50, 15)
    scale: float = 2.7

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"xAR": self.model}

    def ways(self) -> list[Way]:
        model, cells, count = self.model, self.model.order.num_steps, self.num_inference_steps
        guidance, annealed = RampGuidance(self.scale), annealed_steps(cells, *self.annealed)

        def drawing(counts: int | tuple[int, ...]) -> Draw:
            return lambda labels, streams: generate_flow(
                model, labels, streams=streams, num_inference_steps=counts, guidance=guidance
            )

        return [
            Way("decoding", f"{cells} x {count}", drawing(count), self._parts),
            Way("DiSA", " + ".join(map(str, annealed)), drawing(annealed), self._parts),
        ]

    def plain_ways(self, every: int) -> list[Way]:
        model, cells, count = self.model, self.model.order.num_steps, self.num_inference_steps
        guidance = RampGuidance(self.scale)

        def draw(labels: Tensor, streams: ImageStreams) -> Tensor:
            return plain_flow(
                model, labels, streams=streams, num_inference_steps=count // every, guidance=guidance
            )

        _check_share(count, every)
        return [Way(PLAIN, f"{cells} x {count}", draw, self._parts, every)]

    def with_few_steps(self) -> XARFamily:
        return replace(self, num_inference_steps=3)

    @property
    def _parts(self) -> tuple[Methods, Methods, Methods]:
        model = self.model
        return [(model.encoder, "forward")], [(model.decoder, "forward")], [(model, "modulate")]


@dataclass(frozen=True)
class MARFamily:
    """MAR; the defaults are published for MAR-B or by DiSA.

    Args:
        model: the generator.
        draft: a smaller one, for speculation.
        num_steps: evaluations of encoder and decoder.
        num_inference_steps: denoising steps at each.
        annealed: denoising steps of DiSA at the first evaluation and at the last.
        published: `num_steps` and `num_inference_steps` of the published images.
        published_every: one in so many of their steps is done, spread evenly.
        scale: of the guidance.
    """

    model: MAR
    draft: MAR
    num_steps: int = 64
    num_inference_steps: int = 25
    annealed: tuple[int, int] = (50, 5)
    published: tuple[int, int] = (256, 100)
    published_every: int = 32
    scale: float = 2.9

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"MAR": self.model, "draft": self.draft}

    def ways(self) -> list[Way]:
        model, steps, count = self.model, self.num_steps, self.num_inference_steps
        shared: dict[str, Any] = {"num_steps": steps, "guidance": LinearGuidance(self.scale)}
        even = shared | {"num_inference_steps": count}
        annealed = shared | {
            "num_inference_steps": annealed_steps(steps, *self.annealed),
            "head": DiffusionHead(last_timestep=DISA_LAST_TIMESTEP),
        }
        parts, at = self._parts(model), f"{steps} x {count}"

        def drawing(options: dict[str, Any]) -> Draw:
            return lambda labels, streams: generate_mar(model, labels, streams=streams, **options)

        def speculate(labels: Tensor, streams: ImageStreams) -> Tokens:
            return generate_speculative(self.draft, model, labels, streams=streams, **even)

        return [
            Way("decoding", at, drawing(even), parts),
            Way("DiSA", f"{steps} x {self.annealed[0]} to {self.annealed[1]}", drawing(annealed), parts),
            Way("context reuse", at, drawing(even | {"reuse": ContextReuse()}), parts),
            Way("speculation", at, speculate, self._parts(model, self.draft)),
        ]

    def plain_ways(self, every: int) -> list[Way]:
        _check_share(self.num_steps, every)
        _check_share(self.published[0], self.published_every)
        return [
            self._plain_way(PLAIN, self.num_steps, self.num_inference_steps, every),
            self._plain_way(PUBLISHED, *self.published, self.published_every),
        ]

    def _plain_way(self, name: str, num_steps: int, count: int, every: int) -> Way:
        plain, guidance = PlainMAR(self.model, every), LinearGuidance(self.scale)

        def draw(labels: Tensor, streams: ImageStreams) -> Tensor:
            return plain.generate(
                labels, streams=streams, num_steps=num_steps, num_inference_steps=count, guidance=guidance
            )

        *_, head = self._parts(self.model)
        return Way(
            name, f"{num_steps} x {count}", draw, ([(plain, "encode")], [(plain, "decode")], head), every
        )

    def with_few_steps(self) -> MARFamily:
        return replace(self, num_steps=4, num_inference_steps=4, annealed=(4, 2))

    @staticmethod
    def _parts(*models: MAR) -> tuple[Methods, Methods, Methods]:
        names = ("embed_conditions", "modulate", "denoise")
        head: Methods = [(model.denoiser, name) for model in models for name in names]
        return [(model, "encode") for model in models], [(model, "decode") for model in models], head


FAMILIES: dict[str, Callable[[], Family]] = {  # class-conditional, 256 px: 16x16 tokens of 16 channels
    "xar-b": lambda: XARFamily(_random(XAR(**xar.PRESETS["base"]))),
    "mar-b": lambda: MARFamily(_random(MAR(**mar.PRESETS["base"])), _random(MAR(**DRAFT))),
}


def _random(model: Any) -> Any:
    return randomize(model).eval()


def _check_share(num_steps: int, every: int) -> None:
    if every < 1 or num_steps % every:
        raise ValueError(f"{num_steps} steps cannot be timed by doing one in {every}; use a divisor")


def build_family(name: str) -> Family:
    """A family at full size with random weights, in evaluation mode.

    Raises:
        ValueError: an unknown family.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; choose from {', '.join(FAMILIES)}")
    torch.manual_seed(0)
    return FAMILIES[name]()
