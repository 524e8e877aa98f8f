"""What `vistok.eval.speed` times: how a kind of model draws, how it would do so plainly, and how much work that is.

Generators draw tokens, without a tokenizer; tokenizers decode random tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vistok.decoding.guidance import (
    ConstantGuidance,
    GuidanceSchedule,
    RampGuidance,
)
from vistok.decoding.masked import MaskedSamplingParams, generate_masked, predict
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.eval.continuous_ways import Family, MARFamily, XARFamily
from vistok.eval.plain_loops import plain_loop, plain_masked, plain_ordered, plain_predict
from vistok.eval.plain_tokenizers import FLEXTOK_GUIDANCE, plain_decode
from vistok.eval.speed_floor import Pass
from vistok.eval.speed_work import (
    cache_bytes,
    count_flops,
    flow_passes,
    linear_size,
    mar_passes,
    masked_passes,
    modules_called,
    ordered_passes,
    own_bytes,
    weight_bytes,
)
from vistok.models.generators.base import Condition, OrderedGenerator, join_conditions
from vistok.models.generators.maskgit import MaskGIT
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.flextok import FlexTok, FlexTokDecoder
from vistok.order import RasterOrder
from vistok.tokens import Tokens

FLEXTOK_STEPS = 20
PARITY_TOKENS = (
    17  # fed one step after the other before logits are compared; more than a row of a grid of 16 x 16
)


class Subject(Protocol):
    """A family, in the type that it has been converted to.

    Attributes:
        model: all weights.
        num_tokens: of an image.
        shares: a call can be cut to one in so many of its steps; ascending, the first is 1.
        tolerance: what implementations in float32 may differ by: root mean square, over that of the values.
        protocol: what a call does.
    """

    model: Any
    num_tokens: int
    shares: tuple[int, ...]
    tolerance: float
    protocol: str

    def draw(self, model: Any, batch_size: int, share: int) -> Any:
        """As the package does it, with `model` or what was made of it."""
        ...

    def draw_plain(self, batch_size: int, share: int) -> Any:
        """The plain way."""
        ...

    def outputs(self, model: Any) -> Tensor:
        """What `model` computes on given inputs, as the package draws."""
        ...

    def plain_outputs(self) -> Tensor:
        """The same, as the plain way computes it."""
        ...

    def passes(self, batch_size: int, share: int) -> list[Pass]:
        """The work of a call."""
        ...

    def state_bytes(self, batch_size: int, share: int) -> int:
        """Memory that a call writes to as it goes on."""
        ...


class _Enough(Exception):
    """All steps are done that were asked for."""


class OrderedSubject:
    """A generator with a fixed order, both branches of guidance as one batch.

    Args:
        model: in evaluation mode.
        conditions, null_conditions: of so many images; the model's own null condition by default.
        scale: of the guidance.
        text_length: positions of a text that a cross-attention reads.
    """

    tolerance = 1e-4

    def __init__(
        self,
        model: OrderedGenerator,
        conditions: Callable[[int], Condition],
        null_conditions: Callable[[int], Condition] | None = None,
        *,
        scale: float = 2.0,
        text_length: int = 0,
    ) -> None:
        self.model = model
        self.conditions = conditions
        self.null_conditions = null_conditions
        self.scale = scale
        self.text_length = text_length
        self.num_tokens = model.num_tokens
        self.num_steps = model.order.num_steps
        is_raster = isinstance(model.order, RasterOrder)
        self.shares = tuple(
            s for s in (1, 2, 4, 8, 16, 32) if s == 1 or is_raster and self.num_steps >= 4 * s
        )
        self.protocol = f"{self.num_tokens} tokens in {self.num_steps} steps, guidance {scale:g}"

    def draw(self, model: Any, batch_size: int, share: int) -> Tokens | None:
        null = None if self.null_conditions is None else self.null_conditions(batch_size)
        last = self.num_steps // share - 1

        def stop(step: int, indices: Tensor) -> None:
            if step == last < self.num_steps - 1:
                raise _Enough

        # Not with `num_tokens`: caches, and the programs compiled for them, shall be those of a whole image.
        with contextlib.suppress(_Enough):
            return generate_ordered(
                model,
                self.conditions(batch_size),
                streams=ImageStreams.from_seeds(range(batch_size)),
                guidance=ConstantGuidance(self.scale),
                null_condition=null,
                on_step=stop,
            )
        return None

    def draw_plain(self, batch_size: int, share: int) -> Tensor:
        return plain_ordered(
            self.model,
            self._rows(batch_size),
            num_steps=self.num_steps // share,
            guidance_scale=self.scale,
            generator=torch.Generator(self.model.device).manual_seed(0),
        )

    @torch.no_grad()
    def outputs(self, model: Any) -> Tensor:
        rows = self._rows(1)
        cache = model.new_cache(len(rows))
        return self._logits(model.prefill(rows, cache), lambda indices: model.step(indices, cache))

    @torch.no_grad()
    def plain_outputs(self) -> Tensor:
        loop = plain_loop(self.model)
        return self._logits(loop.begin(self._rows(1)), loop.follow)

    def passes(self, batch_size: int, share: int) -> list[Pass]:
        return ordered_passes(self.model, batch_size, self.num_steps // share, text_length=self.text_length)

    def state_bytes(self, batch_size: int, share: int) -> int:
        return cache_bytes(self.model, batch_size, self.num_tokens // share)

    def _rows(self, batch_size: int) -> Any:
        condition = self.conditions(batch_size)
        of_model = self.model.null_condition_for
        null = of_model(condition) if self.null_conditions is None else self.null_conditions(batch_size)
        return join_conditions(condition, null).to(self.model.device)

    def _logits(self, first: Tensor, follow: Callable[[Tensor], Tensor]) -> Tensor:
        """Of both branches, from the condition and given tokens."""
        indices = random_indices(self.model.codebook_size, 1, self.num_tokens).to(self.model.device)
        logits, num_fed = [first.float()], 0
        for positions in self.model.order.plan()[:-1]:
            # A copy: what replays a graph writes the next logits to the same place.
            logits.append(follow(indices[:, positions].repeat(2, 1)).float().clone())
            num_fed += len(positions)
            if num_fed >= PARITY_TOKENS:
                break
        return torch.cat(logits, dim=1)  # [2 k v]


class MaskedSubject:
    """A masked generator.

    Args:
        model: in evaluation mode.
        num_steps: of the loop.
        guidance: scale per step.
    """

    tolerance = 1e-4

    def __init__(self, model: MaskGIT, num_steps: int, guidance: GuidanceSchedule) -> None:
        self.model = model
        self.num_steps = num_steps
        self.guidance = guidance
        self.num_tokens = model.num_tokens
        self.shares = tuple(share for share in (1, 2, 4, 8, 16) if num_steps >= 2 * share)
        self.protocol = f"{self.num_tokens} tokens in {num_steps} steps, guidance to {guidance.scale:g}"

    def draw(self, model: Any, batch_size: int, share: int) -> Tensor:
        return generate_masked(model, **self._inputs(batch_size, share))

    def draw_plain(self, batch_size: int, share: int) -> Tensor:
        return plain_masked(self.model, **self._inputs(batch_size, share))

    @torch.no_grad()
    def outputs(self, model: Any) -> Tensor:
        indices, labels, null = self._canvas()
        return predict(model, indices, labels, null, self.guidance.scale)

    @torch.no_grad()
    def plain_outputs(self) -> Tensor:
        indices, labels, _ = self._canvas()
        return plain_predict(self.model, indices, labels, self.guidance.scale)

    def passes(self, batch_size: int, share: int) -> list[Pass]:
        return masked_passes(self.model, batch_size, self.num_steps // share, self.guidance)

    def state_bytes(self, batch_size: int, share: int) -> int:
        return 0

    def _inputs(self, batch_size: int, share: int) -> dict[str, Any]:
        return {
            "class_labels": torch.arange(batch_size, device=self.model.device),
            "streams": ImageStreams.from_seeds(range(batch_size)),
            "sampling": MaskedSamplingParams(self.num_steps // share),
            "guidance": self.guidance,
        }

    def _canvas(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every other token of an image, its class, and none."""
        indices = random_indices(self.model.codebook_size, 1, self.num_tokens)
        indices[:, ::2] = self.model.mask_token_id
        labels = torch.tensor([3, self.model.null_label])
        return tuple(x.to(self.model.device) for x in (indices, labels[:1], labels[1:]))  # type: ignore[return-value]


class ContinuousSubject:
    """xAR or MAR, as `continuous_ways` has them.

    Args:
        family: with its model.
        shares: of its steps.
        protocol: see `Subject`.
    """

    tolerance = 1e-3  # every step amplifies what sums in another order make

    def __init__(self, family: XARFamily | MARFamily, shares: tuple[int, ...], protocol: str) -> None:
        self.family = family
        self.model = family.model
        self.num_tokens = self.model.num_tokens
        self.shares = shares
        self.protocol = protocol

    def draw(self, model: Any, batch_size: int, share: int) -> Any:
        return replace(self._at(share), model=model).ways()[0].draw(*self._inputs(batch_size))

    def draw_plain(self, batch_size: int, share: int) -> Any:
        return self._at(share).plain_ways(1)[0].draw(*self._inputs(batch_size))

    def outputs(self, model: Any) -> Tensor:
        few: Any = replace(self.family, model=model).with_few_steps()
        return few.ways()[0].draw(*self._inputs(1)).data

    def plain_outputs(self) -> Tensor:
        few: Family = self.family.with_few_steps()
        drawn: Any = few.plain_ways(1)[0].draw(*self._inputs(1))
        return drawn

    def passes(self, batch_size: int, share: int) -> list[Pass]:
        family = self._at(share)
        if isinstance(family, XARFamily):
            return flow_passes(
                family.model, batch_size, family.num_inference_steps, RampGuidance(family.scale)
            )
        return mar_passes(family.model, batch_size, family.num_steps, family.num_inference_steps)

    def state_bytes(self, batch_size: int, share: int) -> int:
        return 0

    def _at(self, share: int) -> XARFamily | MARFamily:
        """With one in `share` of the steps; of MAR every step then decides more tokens."""
        if isinstance(self.family, XARFamily):
            return replace(self.family, num_inference_steps=self.family.num_inference_steps // share)
        return replace(self.family, num_steps=self.family.num_steps // share)

    def _inputs(self, batch_size: int) -> tuple[Tensor, ImageStreams]:
        labels = torch.arange(batch_size, device=self.model.device)
        return labels, ImageStreams.from_seeds(range(batch_size))


class TokenizerSubject:
    """A tokenizer that decodes.

    Args:
        model: in evaluation mode.
        num_tokens: of every image.
    """

    tolerance = 1e-3  # deep networks over images in [-1, 1]

    def __init__(self, model: ImageTokenizer, num_tokens: int | None = None) -> None:
        self.model = model
        self.num_tokens = num_tokens or model.num_tokens
        self._counted: dict[int, int] = {}  # share -> operations, of the first type that is asked for
        self._modules: list[nn.Module] = []  # that a call goes through; known when operations are counted
        is_drawn = isinstance(model, FlexTok)
        self.shares: tuple[int, ...] = (1, 2, 5, 10) if is_drawn else (1,)
        steps = f" in {FLEXTOK_STEPS} steps, guidance {FLEXTOK_GUIDANCE:g}" if is_drawn else ""
        self.protocol = f"decode {self.num_tokens} tokens{steps}"

    @torch.no_grad()
    def draw(self, model: Any, batch_size: int, share: int) -> Tensor:
        options = {}
        if isinstance(self.model, FlexTok):
            options = {"num_inference_steps": FLEXTOK_STEPS // share, "guidance_scale": FLEXTOK_GUIDANCE}
        return model.decode(self._tokens(batch_size), **options)

    @torch.no_grad()
    def draw_plain(self, batch_size: int, share: int) -> Tensor:
        return plain_decode(self.model, self._tokens(batch_size), FLEXTOK_STEPS // share)

    def outputs(self, model: Any) -> Tensor:
        return self.draw(model, 1, self.shares[-1]).float()

    def plain_outputs(self) -> Tensor:
        return self.draw_plain(1, self.shares[-1]).float()

    def passes(self, batch_size: int, share: int) -> list[Pass]:
        """By torch's counter, over one image; of a decoder that draws, by what a step more adds."""
        if not isinstance(self.model, FlexTok):
            flops = self._flops(1)
            return [Pass(own_bytes(self._modules), batch_size * flops)]
        decoder: FlexTokDecoder = self.model.decoder
        evaluated = weight_bytes(decoder.patches, decoder.blocks, decoder.to_patches)
        # Modulations of a time are the same for all images.
        shared = 2 * linear_size(decoder.time, decoder.block_modulations, decoder.head_modulation)
        step = self._flops(FLEXTOK_STEPS // 2) - self._flops(FLEXTOK_STEPS)
        rest = Pass(own_bytes(self._modules) - evaluated, batch_size * (self._flops(FLEXTOK_STEPS) - step))
        of_step = batch_size * (step - shared) + shared
        return [rest, Pass(evaluated, of_step, count=FLEXTOK_STEPS // share)]

    def state_bytes(self, batch_size: int, share: int) -> int:
        return 0

    def _flops(self, share: int) -> int:
        if share not in self._counted:
            flops = 0

            def count() -> None:
                nonlocal flops
                flops = count_flops(lambda: self.draw(self.model, 1, share))

            self._modules = modules_called(self.model, count)
            self._counted[share] = flops
        return self._counted[share]

    def _tokens(self, batch_size: int) -> Tokens:
        model = self.model
        assert model.codebook_size is not None
        indices = random_indices(model.codebook_size, batch_size, model.num_tokens)
        tokens = Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout)
        return model.limit(tokens, self.num_tokens).to(model.device)


def random_indices(codebook_size: int, batch_size: int, num_tokens: int) -> Tensor:
    """Tokens `[b n]` int64, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(codebook_size, (batch_size, num_tokens), generator=generator)
