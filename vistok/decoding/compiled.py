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

import torch
from torch import Tensor

from vistok.models.generators.base import Condition, OrderedGenerator
from vistok.models.layers.kv_cache import KVCache
from vistok.order import Order
from vistok.tokens import Layout

CACHE_BUCKET = 64  # tokens; images of other lengths use the same program
MOST_PROGRAMS = 64  # of one model: batch sizes, lengths of caches, tokens per step
NUM_WARM_UPS = 3  # of a step before it is captured

Feed = Callable[[Tensor, KVCache], tuple[Tensor, ...]]


@dataclass
class CompiledCache:
    """The state of one batch.

    Args:
        state: the model's own cache.
        num_steps: how many steps were fed so far.
    """

    state: KVCache
    num_steps: int = 0


class CompiledGenerator:
    """An ordered generator as the generation loop sees it, whose steps run compiled.

    The first step of a kind (rows, tokens per step, bucket of the cache's length) compiles, which takes from seconds to a
    minute; later ones reuse its program. On a CPU the weights are copied: what is changed in the model later has no effect.
    On a GPU the caches that the graphs work on are kept, one for each kind, so one batch is drawn at a time.

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
        self._programs: Feed = _Graphs(model.feed) if model.device.type == "cuda" else _Inductor(model.feed)

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
        return CompiledCache(self.model.new_cache(batch_size, bucket))

    def prefill(self, condition: Any, cache: CompiledCache) -> Tensor:
        """See `OrderedGenerator`; not compiled, as it happens once."""
        logits = self.model.prefill(condition, cache.state)
        cache.state.split_rows(can_grow=False)
        if isinstance(self._programs, _Graphs):
            cache.state = self._programs.kept(cache.state)
        return logits

    def step(self, indices: Tensor, cache: CompiledCache) -> Tensor:
        """See `OrderedGenerator`."""
        outputs = self.feed(indices, cache.state)
        cache.state.advance(indices.shape[1])
        cache.num_steps += 1
        return self.model.next_logits(outputs, cache.num_steps)

    @torch.no_grad()
    def feed(self, indices: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        """`OrderedGenerator.feed`, compiled; on a GPU a cache that it is called with stays allocated."""
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


class _Inductor:
    """Steps compiled by Inductor. For a CPU it packs the weights once ("freezing"), as its matrix products want them."""

    def __init__(self, feed: Feed) -> None:
        self._feed = torch.compile(feed, fullgraph=True)
        self._known: set[tuple[torch.Size, ...]] = set()

    def __call__(self, indices: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        kind = (indices.shape, *(tensor.shape for tensor in cache.tensors()))
        if kind in self._known:
            return self._feed(indices, cache)
        import torch._dynamo.config
        import torch._inductor.config

        with (
            torch._inductor.config.patch(freezing=indices.device.type == "cpu"),
            torch._dynamo.config.patch(recompile_limit=MOST_PROGRAMS),
        ):
            outputs = self._feed(indices, cache)
        self._known.add(kind)
        return outputs


@dataclass(frozen=True)
class _Graph:
    cache: KVCache  # kept, so that no other cache gets its id
    indices: Tensor
    outputs: tuple[Tensor, ...]
    graph: Any  # torch.cuda.CUDAGraph

    def replay(self, indices: Tensor) -> tuple[Tensor, ...]:
        self.indices.copy_(indices)
        self.graph.replay()
        return self.outputs


class _Graphs:
    """Steps compiled by Inductor and captured as CUDA graphs, which work on caches that are kept."""

    def __init__(self, feed: Feed) -> None:
        self._feed = _Inductor(feed)
        self._caches: dict[tuple[torch.Size, ...], KVCache] = {}
        self._graphs: dict[tuple[int, torch.Size], _Graph] = {}

    def kept(self, cache: KVCache) -> KVCache:
        """The cache of the same shapes that graphs work on, with the contents of `cache`; at first `cache` itself."""
        kind = tuple(tensor.shape for tensor in cache.tensors())
        known = self._caches.setdefault(kind, cache)
        if known is not cache:
            known.load(cache)
        return known

    def __call__(self, indices: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        key = (id(cache), indices.shape)
        if key not in self._graphs:
            self._graphs[key] = self._capture(indices, cache)
        return self._graphs[key].replay(indices)

    def _capture(self, indices: Tensor, cache: KVCache) -> _Graph:
        """A step that is not committed can be repeated: it writes the same keys to the same places."""
        static = indices.clone()
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
        return _Graph(cache, static, outputs, graph)
