"""Generators as one would first write their loops, over the modules of ours: what the optimised ones are timed against.

Next-token and next-neighbor generators keep their keys and values by concatenation in every step, attention is torch's over
what is kept, a token is drawn by `torch.multinomial`. Masked generators run both branches of guidance one after the other,
with attention written out. Nothing of caches, kernels and loops of the package is used.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vistok.decoding.guidance import GuidanceSchedule
from vistok.decoding.masked import MaskedSamplingParams, gumbel
from vistok.decoding.streams import UniformSource
from vistok.kernels.attention import attention_backend
from vistok.models.generators.base import MaskedGenerator, OrderedGenerator
from vistok.models.generators.flex_ar import FlexAR, FlexARClass, FlexARText
from vistok.models.generators.llamagen import GridTransformer, LlamaGen
from vistok.models.generators.nar import NAR, merge_heads
from vistok.models.generators.text_ar import TextAR
from vistok.models.layers.rope import rotate
from vistok.order import ConfidenceOrder


class PlainLoop(Protocol):
    """A generator with its state."""

    def begin(self, condition: Any) -> Tensor:
        """Feed the condition; logits of step 0, `[r k v]`."""
        ...

    def follow(self, indices: Tensor) -> Tensor:
        """Feed the tokens `[r k]` of the last step; logits of the next one, `[r k' v]`."""
        ...


class Kept:
    """Keys and values of all layers, made anew by every block that is added."""

    def __init__(self, depth: int) -> None:
        self.keys: list[Tensor | None] = [None] * depth
        self.values: list[Tensor | None] = [None] * depth

    @property
    def length(self) -> int:
        """Positions so far."""
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Add `k, v [r hk n d]`, and attend from `q [r h n d]` to everything: `[r n h*d]`."""
        old_keys, old_values = self.keys[layer], self.values[layer]
        if old_keys is not None and old_values is not None:
            k, v = torch.cat([old_keys, k], dim=2), torch.cat([old_values, v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        times = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


class PlainGrid:
    """LlamaGen and NAR, whose forwards differ in the heads alone."""

    def __init__(self, model: GridTransformer) -> None:
        self.model = model
        self.blocks: list[Any] = [*model.blocks]

    def begin(self, condition: Any) -> Tensor:
        model = self.model
        self.kept, self.step, self.rope = Kept(len(self.blocks)), 0, model.rope()
        prefix, self.keep = model.prefix(condition)  # [r p d]
        mask = torch.ones(prefix.shape[1], prefix.shape[1], dtype=torch.bool, device=prefix.device).tril()
        if self.keep is not None:
            itself = torch.eye(prefix.shape[1], dtype=torch.bool, device=prefix.device)
            mask = (mask & self.keep[:, None] | itself)[:, None]  # [r 1 p p]
        before, after = self._blocks(prefix, mask)
        return self._logits(before[:, -1:], after[:, -1:])

    def follow(self, indices: Tensor) -> Tensor:
        self.step += 1
        mask = None
        if self.keep is not None:
            num_tokens = self.kept.length + indices.shape[1] - self.keep.shape[1]
            mask = F.pad(self.keep, (0, num_tokens), value=True)[:, None, None]  # [r 1 1 n]
        return self._logits(*self._blocks(self.model.token_embed(indices), mask))

    def _blocks(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[r n d]` -> before the last block and after it."""
        first, options = self.kept.length, self.model.options
        cos, sin = (factors[first : first + hidden_states.shape[1]] for factors in self.rope)
        before = hidden_states
        for i, block in enumerate(self.blocks):
            before, heads = hidden_states, (options.num_heads, options.kv_heads, options.kv_heads)
            qkv = rearrange(block.attn.qkv(block.norm1(before)), "b n (h d) -> b h n d", h=sum(heads))
            q, k, v = qkv.split(heads, dim=1)
            seen = self.kept.attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
            hidden_states = before + block.attn.proj(seen)
            hidden_states = hidden_states + block.mlp(block.norm2(hidden_states))
        return before, hidden_states

    def _logits(self, before: Tensor, after: Tensor) -> Tensor:
        model = self.model
        if isinstance(model, NAR):
            return merge_heads(*model.logits(before, after), self.step, model.options.grid_size)
        assert isinstance(model, LlamaGen)
        return model.logits(after)


def _attend(kept: Kept, layer: int, attention: Any, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention with a fused projection and norms of queries and keys: `[r n d]` -> `[r n d]`."""
    qkv = attention.qkv(hidden_states)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)
    return attention.proj(kept.attend(layer, attention.q_norm(q), attention.k_norm(k), v, mask))


class PlainTextAR:
    """TextAR."""

    def __init__(self, model: TextAR) -> None:
        self.model = model
        self.blocks: list[Any] = [*model.blocks]

    def begin(self, condition: Tensor) -> Tensor:
        model = self.model
        self.kept, self.num_fed = Kept(len(self.blocks)), 0
        text, self.summary = model.text_encoder(condition)
        start = self._embed(model.start_embed.expand(len(text), -1, -1))
        hidden_states = torch.cat([text, start], dim=1)  # [r t+1 d]
        size = hidden_states.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool, device=hidden_states.device).tril()
        return self._blocks(hidden_states, mask)[:, -1:]

    def follow(self, indices: Tensor) -> Tensor:
        self.num_fed += indices.shape[1]
        return self._blocks(self._embed(self.model.token_embed(indices)), None)

    def _embed(self, embedded: Tensor) -> Tensor:
        model = self.model
        return (embedded + model.position_embed[:, self.num_fed, None]) * model.embed_scale + self.summary

    def _blocks(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden_states = hidden_states + _attend(
                self.kept, i, block.attn, block.norm1(hidden_states), mask
            )
            gate, up = block.gate_up(block.norm2(hidden_states)).chunk(2, dim=-1)
            hidden_states = hidden_states + block.down(F.silu(gate) * up)
        return F.linear(self.model.norm(hidden_states), self.model.token_embed.weight)


class PlainFlexAR:
    """FlexAR, conditioned on a class or on a text."""

    def __init__(self, model: FlexAR) -> None:
        self.model = model
        self.blocks: list[Any] = [*model.blocks]

    def begin(self, condition: Any) -> Tensor:
        model = self.model
        self.kept, self.num_fed = Kept(len(self.blocks)), 0
        start = (model.start_embed + model.position_embed[:1]).expand(len(condition), -1, -1)  # [r 1 d]
        self.text: Any = None
        if isinstance(model, FlexARText):
            self.text = model.read_text(condition)
        else:
            assert isinstance(model, FlexARClass)
            start = start + model.embed_class(condition)[:, None]
        return self._blocks(start)

    def follow(self, indices: Tensor) -> Tensor:
        self.num_fed += 1
        return self._blocks(self.model.token_embed(indices) + self.model.position_embed[self.num_fed])

    def _blocks(self, hidden_states: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden_states = hidden_states + _attend(
                self.kept, i, block.attn, block.norm1(hidden_states), None
            )
            norm = block.norm2
            if self.text is not None:
                seen = self._read_text(block.cross_attn, block.norm2(hidden_states), self.text[i])
                hidden_states, norm = hidden_states + seen, block.norm3
            hidden_states = hidden_states + block.mlp(norm(hidden_states))
        return self.model.head(self.model.out_norm(hidden_states))

    def _read_text(self, attention: Any, hidden_states: Tensor, text: Any) -> Tensor:
        q = rearrange(attention.query(hidden_states), "b n (h d) -> b h n d", h=attention.num_heads)
        keep = text.keep[:, None, None]
        seen = F.scaled_dot_product_attention(attention.q_norm(q), text.keys, text.values, attn_mask=keep)
        return attention.proj(rearrange(seen, "b h n d -> b n (h d)"))


def plain_loop(model: OrderedGenerator) -> PlainLoop:
    """The plain loop of a generator; raises ValueError where there is none."""
    if isinstance(model, GridTransformer):
        return PlainGrid(model)
    if isinstance(model, TextAR):
        return PlainTextAR(model)
    if isinstance(model, FlexAR):
        return PlainFlexAR(model)
    raise ValueError(f"no plain loop for {type(model).__name__} is written")


@torch.no_grad()
def plain_ordered(
    model: OrderedGenerator, rows: Any, *, num_steps: int, guidance_scale: float, generator: torch.Generator
) -> Tensor:
    """Draw the tokens of the first steps.

    Args:
        model: a generator with an order.
        rows: conditions of both branches, the unconditional ones last, on the device of the model.
        num_steps: of its order.
        guidance_scale: at every step.
        generator: on the device of the model.

    Returns:
        `[b n]` int64; tokens of later steps are 0.
    """
    loop, plan = plain_loop(model), model.order.plan()[:num_steps]
    batch_size = len(rows) // 2
    indices = torch.zeros(batch_size, model.num_tokens, dtype=torch.int64, device=model.device)
    logits = loop.begin(rows)
    for step, positions in enumerate(plan):
        cond, uncond = logits.float().chunk(2)
        probs = (uncond + guidance_scale * (cond - uncond)).softmax(dim=-1)  # [b k v]
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(batch_size, -1)
        indices[:, positions] = drawn
        if step + 1 < len(plan):
            logits = loop.follow(drawn.repeat(2, 1))
    return indices


def plain_predict(
    model: MaskedGenerator, indices: Tensor, class_labels: Tensor, guidance_scale: float
) -> Tensor:
    """Guided logits `[b n v]` float32 of a canvas `[b n]`, one branch after the other."""
    with attention_backend("reference"):
        cond = model(indices, class_labels).float()
        uncond = model(indices, torch.full_like(class_labels, model.null_label)).float()
    return uncond + guidance_scale * (cond - uncond)


@torch.no_grad()
def plain_masked(
    model: MaskedGenerator,
    class_labels: Tensor,
    *,
    streams: UniformSource,
    sampling: MaskedSamplingParams,
    guidance: GuidanceSchedule,
) -> Tensor:
    """What `generate_masked` draws, `[b n]`, from the same draws; both branches are computed at every step."""
    shape, mask = (len(class_labels), model.num_tokens), model.mask_token_id
    indices = torch.full(shape, mask, device=model.device)
    order, num_masked = ConfidenceOrder(model.num_tokens, steps=sampling.num_steps), model.num_tokens
    for step in range(sampling.num_steps):
        logits = plain_predict(model, indices, class_labels, guidance.at(step, sampling.num_steps))
        logits = logits / sampling.softmax_temperature_at(step)
        uniforms = streams.uniform(model.num_tokens, model.codebook_size).to(logits.device)
        proposed = (logits + sampling.noise_at(step) * gumbel(uniforms)).argmax(dim=-1)  # [b n]
        confidence = logits.gather(-1, proposed[..., None])[..., 0]
        uniforms = streams.uniform(model.num_tokens).to(logits.device)
        confidence = confidence + sampling.noise_at(step) * gumbel(uniforms)
        is_masked = indices == mask
        indices = torch.where(is_masked, proposed, indices)
        num_masked = order.num_masked_after(step, num_masked)
        least_sure = confidence.masked_fill(~is_masked, float("inf")).argsort(dim=-1)[:, :num_masked]
        indices = indices.scatter(1, least_sure, mask)
    return indices
