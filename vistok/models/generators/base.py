"""What every generator offers; each kind of decoding has its own protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vistok.kernels.attention import TreeMask
from vistok.models.generators.text_features import TextFeatures
from vistok.models.layers.context_cache import ContextCache, Evaluation
from vistok.models.layers.kv_cache import KVCache
from vistok.order import Order, RasterOrder
from vistok.tokens import Layout

Condition = Tensor | TextFeatures  # one row per image


class Generator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Predicts the tokens of an image. It is built for a codebook and a layout, not for one tokenizer."""

    codebook_size: int  # ids 0 .. codebook_size - 1 are image tokens
    num_tokens: int
    layout: Layout = Layout()


class OrderedGenerator(Generator):
    """A generator that decides the positions of an image in a fixed order, with explicit state.

    A `condition` is a `Condition` of the kind that the model is made for, a `cache` what its `new_cache` gives. How
    many tokens were fed follows from the length of the cache; there is no other state.
    """

    @property
    def order(self) -> Order:
        """Which positions are decided at which step; next token unless a family says otherwise."""
        return RasterOrder(self.num_tokens)

    def with_order(self, order: Order) -> OrderedGenerator:
        """This model in another order; only for those that were trained on random orders."""
        raise NotImplementedError(f"{type(self).__name__} follows its own order only")

    def new_cache(self, batch_size: int, num_tokens: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows, with room for `num_tokens` of an image, all when `None`."""
        raise NotImplementedError(f"{type(self).__name__} does not define new_cache()")

    def null_condition(self, batch_size: int) -> Condition:
        """The condition of the unconditional branch, of the kind that `prefill` takes."""
        raise NotImplementedError(f"{type(self).__name__} does not define null_condition()")

    def null_condition_for(self, condition: Any) -> Condition:
        """The condition of the unconditional branch that goes with `condition`, one row for each of its rows."""
        return self.null_condition(len(condition))

    def prefill(self, condition: Any, cache: Any) -> Tensor:
        """Feed the condition; returns the logits of the positions of step 0 in ascending order, `[b k codebook_size]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define prefill()")

    def step(self, indices: Tensor, cache: Any) -> Tensor:
        """Feed the tokens decided last; returns the logits of the positions that the order decides next.

        Args:
            indices: `[b k]` int64, the tokens of one step, by ascending position. A next-token generator takes any
                number of tokens and returns the logits of what follows each of them.
            cache: holds everything fed before.

        Returns:
            `[b k' codebook_size]`, by ascending position.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define step()")

    def feed(self, indices: Tensor, cache: Any) -> tuple[Tensor, ...]:
        """The part of `step` that computes, so that it can be compiled: shapes are static, the host reads no value.

        Args:
            indices: `[b k]` int64, the tokens of one step.
            cache: with rows of their own lengths, see `KVCache.split_rows`; `advance` goes after it.

        Returns:
            What `next_logits` takes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no part of a step that can be compiled")

    def next_logits(self, outputs: tuple[Tensor, ...], step: int) -> Tensor:
        """The logits of the positions that the order decides at `step`, as `step` returns them, from those of `feed`."""
        return outputs[0]


@dataclass(frozen=True)
class Reading:
    """What a next-token generator makes of some positions.

    Args:
        features: `[r n d]`, what the head reads.
        logits: `[r k v]`, of the last `k` of these positions; they predict the tokens that follow them.
    """

    features: Tensor
    logits: Tensor


class NextTokenGenerator(OrderedGenerator):
    """A generator that predicts the token that follows each token, in raster order, and so can verify drafts."""

    def prefill(self, condition: Any, cache: Any) -> Tensor:
        return self.read_prefix(condition, cache).logits

    def read_prefix(self, condition: Any, cache: Any) -> Reading:
        """Feed the condition.

        Returns:
            The features of all positions before the first token, `[r n d]`, and the logits of the last, `[r 1 v]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define read_prefix()")

    def read_nodes(self, indices: Tensor, depths: Tensor, mask: TreeMask, cache: Any) -> Reading:
        """Feed nodes of a tree, which stay in the cache until its `commit`.

        Args:
            indices: `[r t]` int64 tokens.
            depths: `[r t]` int64; a node of depth k is the token k places after those committed. Places beyond the
                end of the image count as its last.
            mask: who sees whom.
            cache: with rows of their own lengths, see `KVCache.split_rows`.

        Returns:
            Features `[r t d]` and logits `[r t v]` of all nodes.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define read_nodes()")

    def feed(self, indices: Tensor, cache: Any) -> tuple[Tensor, ...]:
        depths = torch.arange(indices.shape[1], device=indices.device)
        earlier = depths <= depths[:, None]
        mask = TreeMask(cache.lengths, earlier[None])
        return (self.read_nodes(indices, depths.expand(len(indices), -1), mask, cache).logits,)

    def features_to_logits(self, features: Tensor) -> Tensor:
        """The head: `[r n d]` -> `[r n v]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define features_to_logits()")

    def embed_tokens(self, indices: Tensor) -> Tensor:
        """The table of tokens: `[r n]` int64 -> `[r n d]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define embed_tokens()")


def join_conditions(first: Condition, second: Condition) -> Condition:
    """Two batches of conditions as one, on the device of the first."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second.to(first.device)])
    if isinstance(first, TextFeatures) and isinstance(second, TextFeatures):
        return first.join(second)
    raise ValueError(
        f"a {type(first).__name__} and a {type(second).__name__} are conditions of different generators"
    )


def repeat_each(condition: Condition, times: int) -> Condition:
    """Every row of a batch of conditions `times` times in a row."""
    if isinstance(condition, Tensor):
        return condition.repeat_interleave(times, dim=0)
    return condition.repeat_each(times)


class ContinuousGenerator(Generator):
    """A generator of continuous tokens, conditioned on a class.

    It works on latents times `latent_scale`; the `Tokens` that its loop gives back are not scaled, so that the tokenizer
    decodes them as they are.
    """

    codebook_size: None = None  # type: ignore[assignment]  # there is none
    latent_dim: int  # channels of a token
    latent_scale: float
    num_classes: int

    def __init__(
        self, *, latent_dim: int, latent_scale: float, num_tokens: int, layout: str, num_classes: int
    ) -> None:
        super().__init__()
        if not 0 < latent_scale < float("inf"):
            raise ValueError(f"latent_scale must be above 0, got {latent_scale}")
        self.latent_dim = latent_dim
        self.latent_scale = latent_scale
        self.num_tokens = num_tokens
        self.num_classes = num_classes
        self.layout = Layout.parse(layout)

    @property
    def null_label(self) -> int:
        """The class label of the unconditional branch, the first after the classes."""
        return self.num_classes

    def check_latents(self, latents: Tensor) -> None:
        """Raises ValueError unless `latents` are `[b num_tokens latent_dim]`."""
        expected = (self.num_tokens, self.latent_dim)
        if latents.ndim != 3 or latents.shape[1:] != expected:
            raise ValueError(
                f"{type(self).__name__} takes latents [b {expected[0]} {expected[1]}], got {list(latents.shape)}"
            )

    def check_class_labels(self, class_labels: Tensor, batch_size: int) -> None:
        """Raises ValueError unless there is one label per image, of a class or the null label."""
        if class_labels.shape != (batch_size,):
            raise ValueError(f"class_labels must be [{batch_size}], got {list(class_labels.shape)}")
        if batch_size and not 0 <= int(class_labels.min()) <= int(class_labels.max()) <= self.null_label:
            raise ValueError(
                f"class labels must be in 0..{self.num_classes - 1}, or {self.null_label} for none; "
                f"got {class_labels.tolist()}"
            )

    def both_branches(self, class_labels: Tensor, null_labels: Tensor | None) -> Tensor:
        """Labels of both branches, `[2b]` on the device of the model; `null_label` where no others are given.

        Raises:
            ValueError: see `check_class_labels`.
        """
        if null_labels is None:
            null_labels = torch.full_like(class_labels, self.null_label)
        for labels in (class_labels, null_labels):
            self.check_class_labels(labels, len(class_labels))
        return torch.cat([class_labels, null_labels]).to(self.device)


class MaskedGenerator(Generator):
    """A bidirectional generator conditioned on a class: it sees decided tokens and masks, and predicts all positions."""

    num_classes: int

    @property
    def mask_token_id(self) -> int:
        """The id of an undecided position, the first after the codes."""
        return self.codebook_size

    @property
    def null_label(self) -> int:
        """The class label of the unconditional branch, the first after the classes."""
        return self.num_classes

    def forward(self, indices: Tensor, class_labels: Tensor, evaluation: Evaluation | None = None) -> Tensor:
        """Predict every position.

        Args:
            indices: `[b n]` int64, codes and `mask_token_id`.
            class_labels: `[b]` int64 in `[0, num_classes)`, or `null_label`.
            evaluation: from a cache of `new_cache`, which is brought up to date; it may say to compute only some
                positions anew, and to take for all others what the cache has of them.

        Returns:
            Logits `[b n codebook_size]`, or `[b k codebook_size]` of the positions that are evaluated.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def new_cache(self, batch_size: int) -> ContextCache:
        """A cache for `batch_size` rows, for generators whose features of the context can be reused."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define new_cache(), so it cannot reuse features of its context; "
            "evaluate everything at every step: a period of 1"
        )
