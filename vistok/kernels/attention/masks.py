"""Typed attention masks: what may attend to what, independent of the backend that computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class AttentionMask:
    """Base of all masks. `dense` is the definition; a backend may use a cheaper form of the same mask.

    A mask is not changed after it was made: a model makes one per forward pass, and all its layers share it.
    """

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean, `True` means attend, or values added to the logits; broadcasts to `[b h num_queries num_keys]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define dense()")

    def once(self, form: str, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` returns, computed at the first call for a form of this mask on a device and kept with the mask."""
        forms = self.__dict__.setdefault("_forms", {})
        if (form, device) not in forms:
            forms[form, device] = make()
        return forms[form, device]

    def __and__(self, other: AttentionMask) -> AttentionMask:
        return BothMask(self, other)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        return EitherMask(self, other)


@dataclass(frozen=True)
class CausalMask(AttentionMask):
    """The queries are the last `num_queries` positions of the keys; each sees itself and what precedes it."""

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)
        key_positions = torch.arange(num_keys, device=device)
        return (key_positions <= query_positions[:, None])[None, None]  # [1 1 q k]


@dataclass(frozen=True)
class KeyMask(AttentionMask):
    """`keep [b k]`, boolean: keys where it is `False` (padding, a dropped text) are seen by nobody."""

    keep: Tensor

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        if self.keep.shape[-1] != num_keys:
            raise ValueError(f"KeyMask covers {self.keep.shape[-1]} keys, the attention has {num_keys}")
        return self.keep.to(device)[:, None, None, :]  # [b 1 1 k]


@dataclass(frozen=True)
class OrderMask(AttentionMask):
    """Positions see what was decided no later than they were, by their ranks, as an `Order` gives them.

    A query sees a key of its own rank, and a key of a lower rank unless that key is private.

    Args:
        query_ranks: `[q]` int64, or `[b q]` where the rows of a batch have orders of their own.
        key_ranks: `[k]` or `[b k]` int64.
        is_private: `[k]` boolean: keys that only queries of their own rank see; none when `None`.
    """

    query_ranks: Tensor
    key_ranks: Tensor
    is_private: Tensor | None = None

    @staticmethod
    def allows(query_ranks: Tensor, key_ranks: Tensor, is_private: Tensor | None) -> Tensor:
        """The rule itself, for ranks of any shape."""
        earlier = key_ranks < query_ranks
        if is_private is not None:
            earlier = earlier & ~is_private
        return earlier | (key_ranks == query_ranks)

    @property
    def batch_size(self) -> int | None:
        """Rows with orders of their own; `None` where all share one."""
        return next((len(ranks) for ranks in (self.query_ranks, self.key_ranks) if ranks.ndim == 2), None)

    def check(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError unless there is one rank per query and key."""
        if (self.query_ranks.shape[-1], self.key_ranks.shape[-1]) != (num_queries, num_keys):
            raise ValueError(
                f"OrderMask covers {self.query_ranks.shape[-1]} queries and {self.key_ranks.shape[-1]} keys, "
                f"the attention has {num_queries} and {num_keys}"
            )

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        self.check(num_queries, num_keys)
        return self.once("dense", device, lambda: self._dense(device))

    def to(self, device: torch.device) -> OrderMask:
        """As `Tensor.to`."""
        is_private = None if self.is_private is None else self.is_private.to(device)
        return OrderMask(self.query_ranks.to(device), self.key_ranks.to(device), is_private)

    def _dense(self, device: torch.device) -> Tensor:
        mask = self.to(device)
        queries, keys = mask.query_ranks[..., :, None], mask.key_ranks[..., None, :]
        allowed = self.allows(queries, keys, mask.is_private)  # [q k] or [b q k]
        return allowed[:, None] if allowed.ndim == 3 else allowed[None, None]


@dataclass(frozen=True)
class LastKeyRepeats(AttentionMask):
    """Every key is seen, and the last one counts as `count` equal keys: its logit grows by `log(count)`."""

    count: int

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        added = torch.zeros(num_keys)
        added[-1] = math.log(self.count)
        return added.to(device)[None, None, None]  # [1 1 1 k], float32


@dataclass(frozen=True)
class PackedMask(AttentionMask):
    """Several sequences one after another in one row, as `pack` lays them: each sees itself alone.

    Args:
        lengths: of the sequences; their sum is the length of the row.
    """

    lengths: tuple[int, ...]

    def check(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError unless queries and keys are the positions of this row."""
        if not num_queries == num_keys == sum(self.lengths):
            raise ValueError(
                f"PackedMask covers {sum(self.lengths)} positions, "
                f"the attention has {num_queries} queries and {num_keys} keys"
            )

    def sequence_ids(self, device: torch.device) -> Tensor:
        """Which sequence each position of the row belongs to, `[n]`."""
        return torch.repeat_interleave(torch.tensor(self.lengths)).to(device)

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        self.check(num_queries, num_keys)
        ids = self.sequence_ids(device)
        return (ids[:, None] == ids)[None, None]  # [1 1 n n]


@dataclass(frozen=True)
class SelfMask(AttentionMask):
    """Every query sees the key at its own place, counted from the end; padding then attends to itself, not to nothing."""

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        places = torch.arange(num_keys - num_queries, num_keys, device=device)
        return (torch.arange(num_keys, device=device) == places[:, None])[None, None]  # [1 1 q k]


@dataclass(frozen=True)
class TreeMask(AttentionMask):
    """The queries are nodes of a tree, the keys a cache whose rows advance separately.

    Row i of the keys holds `lengths[i]` committed positions, then `t` nodes, then padding up to the longest row. The
    queries are the last `q` of the nodes; each sees the committed positions of its row, its ancestors and itself.

    Args:
        lengths: `[b]` int64.
        ancestors: `[b q t]` boolean: node j is the query's node or above it.
    """

    lengths: Tensor
    ancestors: Tensor

    @property
    def num_keys(self) -> int:
        """Positions of the longest row with its nodes."""
        longest = self.once("longest", self.lengths.device, lambda: int(self.lengths.max()))
        return longest + self.ancestors.shape[2]

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        expected = (self.ancestors.shape[1], self.num_keys)
        if expected != (num_queries, num_keys):
            raise ValueError(
                f"TreeMask covers {expected[0]} queries and {expected[1]} keys, "
                f"the attention has {num_queries} and {num_keys}"
            )
        return self.once("dense", device, lambda: self._dense(num_keys, device))

    def _dense(self, num_keys: int, device: torch.device) -> Tensor:
        lengths, ancestors = self.lengths.to(device), self.ancestors.to(device)
        node = (
            torch.arange(num_keys, device=device) - lengths[:, None]
        )  # [b k], of the key; negative: committed
        last = ancestors.shape[2] - 1
        places = node.clamp(0, last)[:, None].expand(-1, ancestors.shape[1], -1)  # [b q k]
        is_above = ancestors.gather(2, places) & (node <= last)[:, None]
        return (is_above | (node < 0)[:, None])[:, None]  # [b 1 q k]


@dataclass(frozen=True)
class EitherMask(AttentionMask):
    """A pair may attend where one of two boolean masks allows it."""

    left: AttentionMask
    right: AttentionMask

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        left = self.left.dense(num_queries, num_keys, device)
        return left | self.right.dense(num_queries, num_keys, device)


@dataclass(frozen=True)
class BothMask(AttentionMask):
    """A pair may attend where both masks allow it."""

    left: AttentionMask
    right: AttentionMask

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        left = self.left.dense(num_queries, num_keys, device)
        return left & self.right.dense(num_queries, num_keys, device)
