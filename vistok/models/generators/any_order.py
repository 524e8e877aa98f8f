"""AnyOrder: our own class-conditional generators, which differ in what "next" means and in nothing else.

One LLaMA-style trunk (RMSNorm, SwiGLU, rotary positions; Touvron et al. 2023, section 2.2) with one set of parameters:
`AnyOrderMasked` reads `[class, tokens or masks]` in both directions, as MaskGIT does. `AnyOrderAR` decides the positions
in any `Order`. A token's place is then not its number in the sequence, so what is asked for must be said: next to the
content of every position goes a query, the mask's embedding at that position (the two streams of XLNet, Yang et al. 2019,
section 2.3; for images ARPG, Li et al. 2025). Both streams share all weights and one sequence:

    [class, content of every position, query of every position]

The class has rank -1, at step s content has rank 2s + 1 and a query rank 2s, and only queries of its own rank see it
(`OrderMask`). So a query sees the class, the content of earlier steps and the queries decided together with it, and
content sees the content of its own and of earlier steps. A decoding step feeds the tokens decided last and the next
queries at once and keeps the former in the cache.

Positions are told by rotation alone; the class lies at the origin.
"""

from __future__ import annotations

import copy
import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.kernels.attention import AttentionMask, OrderMask
from vistok.models.generators.base import Generator, MaskedGenerator, OrderedGenerator
from vistok.models.generators.llamagen import ClassPrefix
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.context_cache import ContextCache, Evaluation
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache
from vistok.models.layers.mlp import GatedMLP
from vistok.models.layers.norm import RMSNorm
from vistok.models.layers.rope import Rotation, axial_rope
from vistok.order import ConfidenceOrder, Order, make_order
from vistok.tokens import Layout


class AnyOrder(Generator):
    """What both generators share: every parameter, and how a sequence becomes logits."""

    _supports_gradient_checkpointing = False

    def __init__(
        self,
        *,
        codebook_size: int,
        num_classes: int,
        num_tokens: int,
        layout: str,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        qk_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        sizes = {
            "codebook_size": codebook_size,
            "num_classes": num_classes,
            "depth": depth,
            "num_heads": num_heads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.codebook_size = codebook_size
        self.num_classes = num_classes
        self.num_tokens = num_tokens
        self.layout = Layout.parse(layout)
        self.head_dim = dim // num_heads
        # Raises where layout, number of tokens and heads do not fit each other.
        rotation_table(self.layout, num_tokens, self.head_dim, torch.device("cpu"))
        self.prefix = ClassPrefix(num_classes, dim)
        self.token_embed = nn.Embedding(codebook_size, dim)
        self.mask_embed = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            AnyOrderBlock(dim, num_heads, mlp_dim, qk_norm, dropout) for _ in range(depth)
        )
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, codebook_size, bias=False)
        self.apply(_init_weights)

    def check(self, class_labels: Tensor, indices: Tensor) -> None:
        """Raises ValueError unless these are `[b]` labels and `[b num_tokens]` tokens."""
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens:
            raise ValueError(
                f"{type(self).__name__} takes indices [b {self.num_tokens}], got {list(indices.shape)}"
            )
        if class_labels.shape != indices.shape[:1]:
            raise ValueError(f"class labels must be [{len(indices)}], got {list(class_labels.shape)}")

    def rotation(self, places: Tensor) -> Rotation:
        """Rotary angles of `places [n]`, or `[b 1 n]`: 0 is the class, 1 + i is position i."""
        cos, sin = rotation_table(self.layout, self.num_tokens, self.head_dim, places.device)
        return cos[places], sin[places]

    def trunk(
        self,
        embedded: Tensor,
        rotation: Rotation,
        mask: AttentionMask | None,
        cache: KVCache | Evaluation | None = None,
    ) -> Tensor:
        """All blocks, `[b n d]` -> `[b n d]`."""
        hidden_states = self.embed_dropout(embedded)
        for i, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states, rotation, mask, cache.layers[i] if cache is not None else None
            )
        return hidden_states

    def logits(self, hidden_states: Tensor) -> Tensor:
        """`[b n d]` -> `[b n codebook_size]`."""
        return self.head(self.norm(hidden_states))


class AnyOrderAR(AnyOrder, OrderedGenerator):  # type: ignore[misc]  # as for Generator
    """Decides the positions in a fixed order, several at a step where the order has it so.

    Args:
        codebook_size: image token ids.
        num_classes: classes to condition on; the label `num_classes` means none.
        num_tokens: image tokens per image.
        layout: how they lie, as `str(Layout)`: `"sequence"`, `"16x16"`, `"4x8x8"`, `"1x1+2x2+4x4"`.
        order: name of the order, see `make_order`.
        dim: width.
        depth: transformer blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the SwiGLU layers.
        qk_norm: RMS-normalise queries and keys per head.
        dropout: after embeddings, attention and MLP, in training.

    Raises:
        ValueError: layout or order do not fit `num_tokens`, or the heads are too narrow for the axes of the layout.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        num_classes: int = 1000,
        num_tokens: int = 256,
        layout: str = "16x16",
        order: str = "raster",
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 2048,
        qk_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            num_classes=num_classes,
            num_tokens=num_tokens,
            layout=layout,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        self._order = make_order(order, num_tokens, self.layout)

    @property
    def order(self) -> Order:
        return self._order

    def with_order(self, order: Order) -> AnyOrderAR:
        """This model, with all its parameters shared, in another order; the configuration keeps its own.

        Only a model that was trained on random orders follows any order well.

        Raises:
            ValueError: the order is one over another number of tokens.
        """
        if isinstance(order, ConfidenceOrder):
            raise ValueError("a confidence order is not fixed; it is for an AnyOrderMasked")
        if order.num_tokens != self.num_tokens:
            raise ValueError(f"this model has {self.num_tokens} tokens, the order has {order.num_tokens}")
        view = copy.copy(self)
        view._order = order
        return view

    def null_condition(self, batch_size: int) -> Tensor:
        return self.prefix.null(batch_size)

    def forward(self, condition: Tensor, indices: Tensor, order: Order | Tensor | None = None) -> Tensor:
        """Training pass: logits `[b n codebook_size]`, at each position from the class and the tokens decided before.

        Args:
            condition: `[b]` int64, class labels.
            indices: `[b n]` int64, all tokens.
            order: the model's own when `None`. A tensor `[n]` or `[b n]` int64 gives the step at which each position is
                decided, for each image its own.

        Raises:
            ValueError: a wrong shape, or a label out of range.
        """
        self.check(condition, indices)
        n, steps = self.num_tokens, self._steps(order)
        if steps.shape not in ((n,), (len(indices), n)):
            raise ValueError(f"an order must be [{n}] or [{len(indices)} {n}] steps, got {list(steps.shape)}")
        if steps.dtype != torch.int64 or int(steps.min()) < 0:
            raise ValueError(
                f"steps are int64 and count from 0, got {steps.dtype} from {steps.min().item()} on"
            )
        class_rank = torch.full_like(steps[..., :1], -1)
        ranks = torch.cat([class_rank, 2 * steps + 1, 2 * steps], dim=-1)  # [1+2n] or [b 1+2n]
        places = torch.arange(1 + 2 * n, device=indices.device)
        is_query = places > n
        queries = self.mask_embed.expand(len(indices), n, -1)
        embedded = torch.cat([self.prefix(condition)[0], self.token_embed(indices), queries], dim=1)
        rotation = self.rotation(places - n * is_query)
        hidden_states = self.trunk(embedded, rotation, OrderMask(ranks, ranks, is_query))
        return self.logits(hidden_states[:, 1 + n :])

    def _steps(self, order: Order | Tensor | None) -> Tensor:
        if isinstance(order, Tensor):
            return order.to(self.device)
        return make_route(order or self.order, self.device).steps

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> AnyOrderCache:
        return AnyOrderCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.config["num_heads"],
            max_length=1 + (num_tokens or self.num_tokens),
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def prefill(self, condition: Tensor, cache: AnyOrderCache) -> Tensor:
        """Feed the class `[b]`; returns logits `[b k codebook_size]` of the `k` positions of step 0."""
        asked = make_route(self.order, self.device).positions(0, 0)
        return self._advance(self.prefix(condition)[0], asked, cache)

    def step(self, indices: Tensor, cache: AnyOrderCache) -> Tensor:
        """Feed the tokens of one step, or of several in a row; returns the logits of the steps that follow each.

        Raises:
            ValueError: the tokens are not those of whole steps, nothing follows them, or the cache is too short.
        """
        route = make_route(self.order, self.device)
        first, last = route.steps_of(cache.length - 1, indices.shape[1])
        return self._advance(self.token_embed(indices), route.positions(first + 1, last + 1), cache)

    def _advance(self, embedded: Tensor, asked: Tensor, cache: AnyOrderCache) -> Tensor:
        """Feed `embedded [b k d]`, which the cache keeps, and queries, which it forgets.

        `asked [q]` are the positions that are asked for; returns their logits `[b q codebook_size]`.
        """
        route = make_route(self.order, self.device)
        start, end = cache.length, cache.length + embedded.shape[1]
        cache.reserve(end, len(asked))
        ranks = torch.cat([route.ranks[:end], 2 * route.steps[asked]])
        is_query = torch.arange(len(ranks), device=ranks.device) >= end
        queries = self.mask_embed.expand(len(embedded), len(asked), -1)
        hidden_states = self.trunk(
            torch.cat([embedded, queries], dim=1),
            self.rotation(torch.cat([route.places[start:end], 1 + asked])),
            OrderMask(ranks[start:], ranks, is_query),
            cache,
        )
        cache.rollback(end)
        return self.logits(hidden_states[:, end - start :])


class AnyOrderCache(KVCache):
    """Also has room for queries, which stay for one forward pass only.

    While steps are fed one at a time, the class, the tokens decided and the next queries are never more than the class
    and all tokens; several steps at once can need more.
    """

    def reserve(self, length: int, num_queries: int) -> None:
        """Make room for `length` positions that stay and some queries after them.

        Raises:
            ValueError: so many positions were not to stay.
        """
        if length > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {length} were asked for")
        missing = length + num_queries - self.layers[0].keys.shape[2]
        if missing > 0:
            for layer in self.layers:
                layer.keys, layer.values = (F.pad(x, (0, 0, 0, missing)) for x in (layer.keys, layer.values))


class AnyOrderMasked(AnyOrder, MaskedGenerator):  # type: ignore[misc]  # as for Generator
    """Predicts all positions at once from those that are decided; `generate_masked` decides which to keep.

    Its parameters are those of an `AnyOrderAR` of the same size, by name and by shape.

    Args:
        codebook_size, num_classes, num_tokens, layout, dim, ..., dropout: see `AnyOrderAR`.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        num_classes: int = 1000,
        num_tokens: int = 256,
        layout: str = "16x16",
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 2048,
        qk_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            num_classes=num_classes,
            num_tokens=num_tokens,
            layout=layout,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            qk_norm=qk_norm,
            dropout=dropout,
        )

    def forward(self, indices: Tensor, class_labels: Tensor, evaluation: Evaluation | None = None) -> Tensor:
        """See `MaskedGenerator.forward`."""
        self.check(class_labels, indices)
        is_masked = (indices == self.mask_token_id)[..., None]  # [b n 1]
        tokens = self.token_embed(indices.masked_fill(is_masked[..., 0], 0))
        embedded = torch.where(is_masked, self.mask_embed, tokens)
        # Labels are checked by the loop, once: the host would wait here for the device at every step.
        embedded = torch.cat([self.prefix.embed(class_labels)[:, None], embedded], dim=1)  # [b 1+n d]
        places = torch.arange(1 + self.num_tokens, device=indices.device)
        if evaluation is not None:
            embedded = evaluation.select(embedded)
            places = evaluation.select(places.expand(len(indices), -1))[:, None]  # [b 1 1+k]
        hidden_states = self.trunk(embedded, self.rotation(places), None, evaluation)
        return self.logits(hidden_states[:, 1:])

    def new_cache(self, batch_size: int) -> ContextCache:
        """See `MaskedGenerator.new_cache`."""
        return ContextCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.config["num_heads"],
            num_tokens=self.num_tokens,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )


class AnyOrderBlock(nn.Module):
    """Self-attention with rotary positions and SwiGLU, each on the RMS-normalised stream and added to it."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, out_bias=False, qk_norm=qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = GatedMLP(dim, mlp_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: Tensor, rotation: Rotation, mask: AttentionMask | None, cache: LayerCache | None
    ) -> Tensor:
        """`[b n d]` -> `[b n d]`."""
        attended = self.attn(self.norm1(hidden_states), mask, cache, rotation)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))


@dataclass(frozen=True)
class Route:
    """An order as `AnyOrderAR` follows it, on one device; what the cache holds is counted from the class on."""

    steps: Tensor  # [n] the step at which each position is decided
    sequence: Tensor  # [n] the positions as they are decided
    places: Tensor  # [1+n] the places of the class and of `sequence`, see `AnyOrder.rotation`
    ranks: Tensor  # [1+n] their ranks as content
    ends: tuple[int, ...]  # how many tokens are decided after each step

    def positions(self, first: int, last: int) -> Tensor:
        """The positions of the steps `first` to `last`, both included, in plan order."""
        return self.sequence[self.ends[first - 1] if first else 0 : self.ends[last]]

    def steps_of(self, num_fed: int, num_tokens: int) -> tuple[int, int]:
        """The first and the last step that `num_tokens` tokens after the first `num_fed` make up.

        Raises:
            ValueError: they are not those of whole steps, or nothing follows them.
        """
        if num_fed < 0:
            raise ValueError("the cache is empty: prefill goes before the first step")
        first, last = bisect_right(self.ends, num_fed), bisect_left(self.ends, num_fed + num_tokens)
        if num_fed + num_tokens >= self.ends[-1]:
            raise ValueError(
                f"nothing follows {num_fed + num_tokens} tokens: an image has {self.ends[-1]}, the last step is not fed"
            )
        if num_tokens < 1 or self.ends[last] != num_fed + num_tokens:
            raise ValueError(
                f"step {first} decides {self.ends[first] - num_fed} tokens, {num_tokens} were fed: whole steps are needed"
            )
        return first, last


@functools.lru_cache(maxsize=32)
def make_route(order: Order, device: torch.device) -> Route:
    """The route of an order; orders are values, so it is made once."""
    with _plain_tensors():
        steps, sequence = order.decided_at(), order.sequence()
        return Route(
            steps=steps.to(device),
            sequence=sequence.to(device),
            places=F.pad(1 + sequence, (1, 0)).to(device),
            ranks=F.pad(2 * steps[sequence] + 1, (1, 0), value=-1).to(device),
            ends=tuple(accumulate(steps.bincount().tolist())),
        )


@functools.lru_cache(maxsize=32)
def rotation_table(layout: Layout, num_tokens: int, head_dim: int, device: torch.device) -> Rotation:
    """Rotary angles `[1+n head_dim/2]` of the class, which is not rotated, and of all positions.

    Channels that are left over when the axes have shared them out are not rotated either.

    Raises:
        ValueError: the layout has another number of positions, or the heads are too narrow for its axes.
    """
    shared = head_dim - head_dim % (2 * layout.num_axes)
    if not shared or head_dim % 2:
        raise ValueError(
            f"heads of {head_dim} channels cannot be rotated over the {layout.num_axes} axes of a {layout}: "
            f"an even number from {2 * layout.num_axes} on is needed"
        )
    rest = (0, (head_dim - shared) // 2, 1, 0)
    with _plain_tensors():
        cos, sin = axial_rope(layout.coordinates(num_tokens), shared)
        return F.pad(cos, rest, value=1.0).to(device), F.pad(sin, rest).to(device)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """For what is kept and used later, in training too, whatever is going on now."""
    with torch.device("cpu"), torch.inference_mode(False):
        yield


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


PRESETS: dict[
    str, dict[str, int]
] = {  # sizes of either class, from B on those of LlamaGen (Sun et al. 2024, table 1)
    "any-order-s": {"dim": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1024},
    "any-order-b": {"dim": 768, "depth": 12, "num_heads": 12, "mlp_dim": 2048},
    "any-order-l": {"dim": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 2816},
    "any-order-xl": {"dim": 1280, "depth": 36, "num_heads": 20, "mlp_dim": 3584},
    "any-order-xxl": {"dim": 1536, "depth": 48, "num_heads": 24, "mlp_dim": 4096},
}
