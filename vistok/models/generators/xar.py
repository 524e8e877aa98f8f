"""xAR: a class-conditional generator of continuous tokens that decides one X after the other (Ren et al. 2025, "Beyond
Next-Token: Next-X Prediction for Autoregressive Visual Generation").

An X is what an `Order` decides at one step: a token, a cell of neighbours (the published models), an interleaved
subsample, a scale, or the whole image. The tokens of a step are drawn together by following a velocity (`FlowHead`) that
two stacks of the same blocks predict from the steps before. Every step of a sequence has a time of its own, which
modulates its tokens; in training all steps are noisy, each at its own time ("noisy context learning", section 3.3), when
drawing the steps before are clean, at time 0.

Positions, rotations and masks follow the order: slot i is the token that is decided i-th.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, OrderMask
from vistok.models.generators.base import ContinuousGenerator
from vistok.models.heads.flow import FlowHead
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.norm import RMSNorm
from vistok.models.layers.rope import Rotation, axial_rope
from vistok.models.layers.time_embed import TimeEmbed
from vistok.order import Order, make_order
from vistok.tokens import Layout

TIME_UNITS = 1000  # the network is told whole thousandths
NORM_EPS = 1e-6

PRESETS = {  # published name -> sizes
    "base": {"dim": 768, "encoder_depth": 8, "decoder_depth": 8, "num_heads": 12, "mlp_dim": 2048},
    "large": {"dim": 1024, "encoder_depth": 16, "decoder_depth": 16, "num_heads": 16, "mlp_dim": 2730},
    "huge": {"dim": 1280, "encoder_depth": 20, "decoder_depth": 20, "num_heads": 16, "mlp_dim": 3413},
}
SAMPLING = {  # published name -> the authors' settings, with `RampGuidance` and `EulerMaruyama`
    "base": {"num_inference_steps": 40, "guidance_scale": 2.7},
    "large": {"num_inference_steps": 50, "guidance_scale": 2.3},
    "huge": {"num_inference_steps": 50, "guidance_scale": 2.2},
}


Modulations = list[
    Tensor
]  # of each block of the encoder, then of the decoder: [b s 6d], for the `s` steps of a pass


class XAR(ContinuousGenerator):
    """Class-conditional next-X generator; `vistok.decoding.flow_sampling` draws from it.

    Args:
        latent_dim: channels of a token.
        latent_scale: what latents are multiplied by inside.
        num_tokens: tokens per image.
        layout: how they lie, as `str(Layout)`: `"16x16"`, `"1x1+2x2+4x4"`.
        order: name of the order, see `make_order`; its steps may be of different sizes.
        num_classes: classes to condition on; the label `num_classes` means none.
        dim: width.
        encoder_depth, decoder_depth: blocks of the two stacks.
        num_heads: attention heads.
        mlp_dim: hidden width of the gated MLPs.
        dropout: in training, on the output of the attention, inside and on the output of the MLP.
        attention_dropout: in training, on the attention weights.

    Raises:
        ValueError: layout, order and `num_tokens` do not fit each other, or the heads cannot be rotated over its axes.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        latent_dim: int = 16,
        latent_scale: float = 0.2325,
        num_tokens: int = 256,
        layout: str = "16x16",
        order: str = "cells-8",
        num_classes: int = 1000,
        dim: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        num_heads: int = 12,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            latent_dim=latent_dim,
            latent_scale=latent_scale,
            num_tokens=num_tokens,
            layout=layout,
            num_classes=num_classes,
        )
        self.order = make_order(order, num_tokens, self.layout)
        self.head = FlowHead()
        self.head_dim = dim // num_heads
        axial_rope(_rope_coordinates(self.layout, num_tokens), self.head_dim)  # raises where they do not fit
        sizes = (dim, num_heads, mlp_dim, dropout, attention_dropout)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.time_embed = TimeEmbed(dim)
        self.latent_embed = nn.Linear(latent_dim, dim)
        self.latent_norm = RMSNorm(dim, NORM_EPS, weight_after_cast=True)
        self.encoder = XARStack(num_tokens, [XARBlock(*sizes) for _ in range(encoder_depth)], dim)
        self.between = nn.Linear(dim, dim)
        self.decoder = XARStack(num_tokens, [XARBlock(*sizes) for _ in range(decoder_depth)], dim)
        self.to_velocity = nn.Linear(dim, latent_dim)
        self.apply(_init_weights)

    def forward(self, noisy: Tensor, times: Tensor, class_labels: Tensor) -> Tensor:
        """Training pass: the velocity of every token, from the tokens of its own step and of the steps before.

        Args:
            noisy: `[b n c]`, scaled and noised, in storage order.
            times: `[b steps]` in [0, 1], how noisy the tokens of each step are; 1 is pure noise.
            class_labels: `[b]` int64, classes or `null_label`.

        Returns:
            `[b n c]`, in storage order.

        Raises:
            ValueError: a wrong shape, or a label out of range.
        """
        self.check_latents(noisy)
        self.check_class_labels(class_labels, len(noisy))
        plan = self.plan()
        if times.shape != (len(noisy), plan.num_steps):
            raise ValueError(
                f"times must be [{len(noisy)} {plan.num_steps}], one per image and step of the order, "
                f"got {list(times.shape)}"
            )
        span = _make_span(plan, 0, self.num_tokens, plan.num_steps)
        modulations = self.modulate(times, class_labels)
        hidden_states = self.stacks(noisy[:, plan.sequence], span, modulations, None)
        return self.to_velocity(hidden_states)[:, plan.slots]

    def modulate(self, times: Tensor, class_labels: Tensor) -> Modulations:
        """What class and time do to the tokens of a step, in every block; the tokens themselves have no part in it.

        Args:
            times: `[b s]` in [0, 1], of any `s` steps; 0 for those that are decided.
            class_labels: `[b]` int64.
        """
        timesteps = (times.float() * TIME_UNITS).trunc()  # the product in float32: it decides what is cut off
        condition = F.silu(self.class_embed(class_labels)[:, None] + self.time_embed(timesteps))  # [b s d]
        return [block.modulation(condition) for block in (*self.encoder.blocks, *self.decoder.blocks)]

    def velocity(self, latents: Tensor, modulations: Modulations, cache: KVCache | None = None) -> Tensor:
        """The velocity of the tokens of one step; earlier steps that are not in the cache may go before them.

        Args:
            latents: `[b m c]`, scaled: all tokens of the steps that follow the cache, up to the one that is asked for,
                each step's by ascending position.
            modulations: of these `s` steps, from `modulate`.
            cache: the steps before; afterwards also those of `latents` but the last. Without one, `latents` begin
                with the first step.

        Returns:
            `[b k c]`, of the tokens of the last of these steps.

        Raises:
            ValueError: the tokens are not those of `s` whole steps that follow the cache.
        """
        plan, start = self.plan(), 0 if cache is None else cache.length
        end, num_steps = start + latents.shape[1], modulations[0].shape[1]
        kept = plan.check_span(start, end, num_steps)
        span = _make_span(plan, start, end, num_steps)
        hidden_states = self.stacks(latents, span, modulations, cache)
        if cache is not None:
            cache.rollback(kept)
        return self.to_velocity(hidden_states[:, kept - start :])

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` rows."""
        return KVCache(
            depth=len(self.encoder.blocks) + len(self.decoder.blocks),
            batch_size=batch_size,
            num_heads=self.config["num_heads"],
            max_length=self.num_tokens,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def plan(self) -> XARPlan:
        """The order, as the network follows it on its device."""
        return _make_plan(self.order, self.layout, self.head_dim, self.device)

    def stacks(self, latents: Tensor, span: Span, modulations: Modulations, cache: KVCache | None) -> Tensor:
        """Both stacks: `latents [b m c]` as they are decided -> features `[b m d]`."""
        caches = [None] * len(modulations) if cache is None else cache.layers
        depth = len(self.encoder.blocks)
        hidden_states = self.latent_embed(latents.to(self.latent_embed.weight.dtype))
        hidden_states = self.encoder.add_positions(hidden_states, span)
        hidden_states = self.encoder(
            self.latent_norm(hidden_states), span, modulations[:depth], caches[:depth]
        )
        hidden_states = self.decoder.add_positions(self.between(hidden_states), span)
        return self.decoder(hidden_states, span, modulations[depth:], caches[depth:])


class Span(NamedTuple):
    """What all blocks share in one pass over the slots `start` to `end`."""

    start: int
    end: int
    rows: Tensor | None  # [m] which of the s steps each token belongs to; None for one step
    rotation: Rotation
    mask: AttentionMask | None

    def per_token(self, values: Tensor) -> Tensor:
        """`[b s d]` -> `[b m d]`, or `[b 1 d]`, which serves all tokens of one step."""
        return values if self.rows is None else values[:, self.rows]


def _make_span(plan: XARPlan, start: int, end: int, num_steps: int) -> Span:
    """The span of the last `num_steps` steps of `start` to `end`."""
    cos, sin = plan.rotation
    rotation = cos[start:end], sin[start:end]
    if num_steps == 1:  # nothing but one step and what is decided before it
        return Span(start, end, None, rotation, None)
    ranks = plan.ranks[start:end]
    return Span(start, end, ranks - ranks[0], rotation, OrderMask(ranks, plan.ranks[:end]))


class XARStack(nn.Module):
    """Blocks over positions of their own, and a norm.

    Args:
        num_tokens: slots.
        blocks: applied one after another.
        dim: width.
    """

    def __init__(self, num_tokens: int, blocks: list[XARBlock], dim: int) -> None:
        super().__init__()
        self.position_embed = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim, NORM_EPS, weight_after_cast=True)

    def add_positions(self, hidden_states: Tensor, span: Span) -> Tensor:
        """`[b m d]` -> `[b m d]`."""
        return hidden_states + self.position_embed[:, span.start : span.end]

    def forward(
        self,
        hidden_states: Tensor,
        span: Span,
        modulations: Modulations,
        caches: list[LayerCache] | list[None],
    ) -> Tensor:
        """`[b m d]` -> `[b m d]`; one modulation and one cache per block."""
        for block, modulation, cache in zip(self.blocks, modulations, caches, strict=True):
            hidden_states = block(hidden_states, span, modulation, cache)
        return self.norm(hidden_states)


class XARBlock(nn.Module):
    """Self-attention and a gated MLP (exact GELU), shifted, scaled and gated by the class and the time of a step.

    As in DiT (Peebles and Xie 2023, section 3.2), with RMS norms without weight, which are scaled and shifted.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn = SelfAttention(dim, num_heads, dropout=attention_dropout)
        self.gate = nn.Linear(dim, mlp_dim)
        self.up = nn.Linear(dim, mlp_dim)
        self.down = nn.Linear(mlp_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: Tensor, span: Span, modulation: Tensor, cache: LayerCache | None
    ) -> Tensor:
        """`[b m d]` -> `[b m d]`; `modulation [b s 6d]` is what the layer of that name makes of class and time."""
        per_token = span.per_token(modulation).chunk(6, dim=-1)
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = per_token
        modulated = _normalized(hidden_states) * (1 + scale_attn) + shift_attn
        attended = self.dropout(self.attn(modulated, span.mask, cache, span.rotation))
        hidden_states = hidden_states + gate_attn * attended
        modulated = _normalized(hidden_states) * (1 + scale_mlp) + shift_mlp
        inner = self.dropout(F.gelu(self.gate(modulated)) * self.up(modulated))
        return hidden_states + gate_mlp * self.dropout(self.down(inner))


def noisy_context_loss(
    model: XAR, latents: Tensor, class_labels: Tensor, times: Tensor, noise: Tensor
) -> Tensor:
    """The training loss: mean squared error of all velocities, every step at its own time (section 3.3).

    Args:
        model: in training mode.
        latents: `[b n c]`, what the tokenizer encodes, not scaled.
        class_labels: `[b]` int64; some of them `null_label`, for guidance.
        times: `[b steps]`, from `logit_normal_times`.
        noise: `[b n c]`, standard normal.

    Returns:
        A scalar.
    """
    clean = latents.float() * model.latent_scale
    token_times = times[:, model.order.decided_at().to(times.device)]  # [b n]
    velocity = model(model.head.noised(clean, noise, token_times), times, class_labels)
    return model.head.loss(velocity, clean, noise, token_times).mean()


@dataclass(frozen=True)
class XARPlan:
    """An order on one device; slots count tokens as they are decided."""

    sequence: Tensor  # [n] the position in each slot
    slots: Tensor  # [n] the slot of each position
    ranks: Tensor  # [n] the step that each slot belongs to
    rotation: Rotation  # [n head_dim/2] each, by slot
    ends: tuple[int, ...]  # the slot after each step

    @property
    def num_steps(self) -> int:
        """Steps of the order."""
        return len(self.ends)

    def check_span(self, start: int, end: int, num_steps: int) -> int:
        """The first slot of the last step in `start` to `end`; raises ValueError unless these are `num_steps` steps."""
        starts = (0, *self.ends[:-1])
        if start not in starts:
            raise ValueError(f"no step begins after {start} of {self.ends[-1]} tokens, which the cache holds")
        first = starts.index(start)
        steps = range(first, first + num_steps)
        if not num_steps or steps.stop > self.num_steps or self.ends[steps[-1]] != end:
            sizes = [after - before for before, after in zip(starts[first:], self.ends[first:], strict=True)]
            raise ValueError(
                f"{end - start} tokens with {num_steps} times were fed at step {first}; "
                f"the steps from there on have {sizes} tokens"
            )
        return starts[steps[-1]]


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept here may be used in training later
def _make_plan(order: Order, layout: Layout, head_dim: int, device: torch.device) -> XARPlan:
    """Orders and layouts are values, so a plan is made once."""
    sequence, steps = order.sequence(), order.decided_at()
    cos, sin = axial_rope(_rope_coordinates(layout, order.num_tokens)[sequence], head_dim)
    return XARPlan(
        sequence=sequence.to(device),
        slots=order.slots().to(device),
        ranks=steps[sequence].to(device),
        rotation=(cos.to(device), sin.to(device)),
        ends=tuple(accumulate(steps.bincount().tolist())),
    )


def _rope_coordinates(layout: Layout, num_tokens: int) -> Tensor:
    """`[n axes]`; of a pyramid rows and columns only, as the learned positions tell its scales apart."""
    coordinates = layout.coordinates(num_tokens)
    return coordinates if layout.scales is None else coordinates[:, 1:]


def _normalized(hidden_states: Tensor) -> Tensor:
    """RMS normalisation without weight, `[b m d]`, in float32."""
    wide = hidden_states.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)).to(hidden_states.dtype)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
