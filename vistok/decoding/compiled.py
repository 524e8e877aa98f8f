"""Steps of generators with a fixed order, compiled: `generate_ordered(CompiledGenerator(model), ...)`.

A step of a small batch is bound by what surrounds the arithmetic: launching kernels on a GPU, dispatching operators and
packing weights on a CPU. Here the cache is allocated once, its lengths stay on the device, and so every step of a kind is
the same program: Inductor compiles it, on a CPU with weights that are packed in advance; on a GPU a CUDA graph replays it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vistok.kernels.inductor import compiler_settings
from vistok.models.generators.base import Condition, OrderedGenerator
from vistok.models.layers.kv_cache import KVCache
from vistok.order import Order
from vistok.tokens import Layout

CACHE_BUCKET = 64  # tokens; images of other lengths use the same program
NUM_WARM_UPS = 3  # of a step before it is captured

Feed = Callable[[Tensor, KVCache], tuple[Tensor, ...]]


@dataclass
class CompiledCache:
    """The state of one batch.

    Args:
        state: the model's own cache.
        max_tokens: of an image, for which it has room.
        num_steps: how many steps were fed so far.
    """

    state: KVCache
    max_tokens: int
    num_steps: int = 0


class CompiledGenerator:
    """An ordered generator as the generation loop sees it, whose steps run compiled.

    The first step of a kind (rows, tokens per step, bucket of the cache's length) compiles, which takes from seconds to a
    minute, and the second of another kind once more, for all others. Later ones reuse these programs. When the model is
    moved or gets another dtype, it compiles anew. On a CPU the weights are copied: what else is changed in the model later
    has no effect. On a GPU the caches that the graphs work on are kept, one for each kind, so one batch is drawn at a time,
    and what a step returns is overwritten by the next.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: the model's steps cannot be compiled.
    """

    def __init__(self, model: OrderedGenerator) -> None:
        if type(model).feed is OrderedGenerator.feed:
            raise ValueError(
                f"{type(model).__name__} has no steps that can be compiled; those of next-token generators and NAR can"
            )
        self.model = model
        self.order: Order = model.order
        self.layout: Layout = model.layout
        self.num_tokens = model.num_tokens
        self.codebook_size = model.codebook_size
        self._weights = _where_weights_are(model)
        self._programs = _make_programs(model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def null_condition_for(self, condition: Any) -> Condition:
        """See `OrderedGenerator`."""
        return self.model.null_condition_for(condition)

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> CompiledCache:
        """See `OrderedGenerator`; its length is rounded up to a multiple of `CACHE_BUCKET` tokens."""
        wanted = self.num_tokens if num_tokens is None else num_tokens
        bucket = min(self.num_tokens, math.ceil(wanted / CACHE_BUCKET) * CACHE_BUCKET)
        self._check_weights()
        if isinstance(
            self._programs, _Graphs
        ):  # the condition goes through a small cache into the one that is kept
            return CompiledCache(self.model.new_cache(batch_size, 1), bucket)
        return CompiledCache(self.model.new_cache(batch_size, bucket), bucket)

    def prefill(self, condition: Any, cache: CompiledCache) -> Tensor:
        """See `OrderedGenerator`; not compiled, as it happens once."""
        logits = self.model.prefill(condition, cache.state)
        if isinstance(self._programs, _Graphs):
            cache.state = self._programs.kept(self.model, cache)
        else:
            cache.state.split_rows(can_grow=False)
        return logits

    def step(self, indices: Tensor, cache: CompiledCache) -> Tensor:
        """See `OrderedGenerator`."""
        outputs = self.feed(indices, cache.state)
        cache.state.advance(indices.shape[1])
        cache.num_steps += 1
        return self.model.next_logits(outputs, cache.num_steps)

    @torch.no_grad()
    def feed(self, indices: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        """`OrderedGenerator.feed`, compiled."""
        self._check_weights()
        return self._programs(indices, cache)

    @torch.no_grad()
    def warm_up(self, condition: Condition, num_tokens: int | None = None) -> None:
        """Compile every kind of step of a batch with such a condition, one row for each row of it."""
        cache = self.new_cache(len(condition), num_tokens)
        self.prefill(condition.to(self.device), cache)
        pending = {len(positions) for positions in self.order.plan()[:-1]}
        for positions in self.order.plan()[:-1]:
            if not pending:
                break
            tokens = torch.zeros(len(condition), len(positions), dtype=torch.int64, device=self.device)
            self.step(tokens, cache)
            pending.discard(len(positions))

    def _check_weights(self) -> None:
        """Forget all programs if they are of weights that are no longer there."""
        now = _where_weights_are(self.model)
        if now != self._weights:
            self._weights, self._programs = now, _make_programs(self.model)


def _where_weights_are(model: OrderedGenerator) -> tuple[torch.device, torch.dtype, int]:
    weight = next(model.parameters())
    return weight.device, weight.dtype, weight.data_ptr()


def _make_programs(model: OrderedGenerator) -> _Inductor | _Graphs:
    return _Graphs(model.feed) if model.device.type == "cuda" else _Inductor(model.feed)


class _Inductor:
    """Steps compiled by Inductor. For a CPU it packs the weights once ("freezing"), as its matrix products want them."""

    def __init__(self, feed: Feed) -> None:
        self._feed = torch.compile(feed, fullgraph=True)
        self._known: set[tuple[torch.Size, ...]] = set()

    def __call__(self, indices: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        kind = (indices.shape, *(tensor.shape for tensor in cache.tensors()))
        if kind in self._known:
            return self._feed(indices, cache)
        with compiler_settings(packs_weights=indices.device.type == "cpu"):
            outputs = self._feed(indices, cache)
        self._known.add(kind)
        return outputs


@dataclass(frozen=True)
class _Graph:
    indices: Tensor
    outputs: tuple[Tensor, ...]
    storage: tuple[int, ...]  # where the tensors of its cache lie
    graph: Any  # torch.cuda.CUDAGraph

    def replay(self, indices: Tensor) -> tuple[Tensor, ...]:
        self.indices.copy_(indices)
        self.graph.replay()
        return self.outputs


class _Graphs:
    """Steps compiled by Inductor and captured as CUDA graphs, which work on caches that are kept."""

    def __init__(self, feed: Feed) -> None:
        self._feed = _Inductor(feed)
        self._caches: dict[tuple[int, int], KVCache] = {}
        self._graphs: WeakKeyDictionary[KVCache, dict[torch.Size, _Graph]] = WeakKeyDictionary()

    def kept(self, model: OrderedGenerator, cache: CompiledCache) -> KVCache:
        """The cache that graphs of this kind work on, with what `cache` holds."""
        batch_size = cache.state.batch_size
        kind = (batch_size, cache.max_tokens)
        if kind not in self._caches:
            self._caches[kind] = model.new_cache(batch_size, cache.max_tokens)
            self._caches[kind].split_rows(can_grow=False)
        kept, rows = self._caches[kind], torch.arange(batch_size, device=model.device)
        kept.clear_rows()
        kept.put_rows(rows, cache.state, rows)
        return kept

    def __call__(self, indices: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        graphs = self._graphs.setdefault(cache, {})
        graph = graphs.get(indices.shape)
        if graph is None or graph.storage != _storage(cache):
            graph = graphs[indices.shape] = self._capture(indices, cache)
        return graph.replay(indices)

    def _capture(self, indices: Tensor, cache: KVCache) -> _Graph:
        """A step that is not committed can be repeated: it writes the same keys to the same places."""
        static = indices.clone()
        with torch.cuda.device(static.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    self._feed(static, cache)
                    cache.forget_nodes()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._feed(static, cache)
        cache.forget_nodes()
        return _Graph(static, outputs, _storage(cache), graph)


def _storage(cache: KVCache) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in cache.tensors())
