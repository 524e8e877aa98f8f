"""Typed attention masks: what may attend to what, independent of the backend that computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention.rules import Rule, rule_of


class AttentionMask:
    """Base of all masks. `dense` is the definition; a backend may use a cheaper form of the same mask.

    A mask is not changed after it was made: a model makes one per forward pass, and all its layers share it.

    What a key holds reaches exactly those queries that see it, as far as it is finite. A NaN may spread from a key that
    some query sees to others, as 0 * NaN is NaN. Only with `hides_keys` may keys that nobody sees hold a NaN.
    """

    @property
    def hides_keys(self) -> bool:
        """Whether nobody may see some keys, which then may hold anything: `KeyMask`, `TreeMask`, and these and others."""
        return False

    @property
    def is_additive(self) -> bool:
        """Whether `dense` adds to the logits."""
        return False

    def check(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError where the mask is one of another number of queries or keys."""
        return

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        """A boolean mask as a function of indices; what it reads lies on the device."""
        return rule_of(self.dense(num_queries, num_keys, device))

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean, `True` means attend, or values added to the logits; broadcasts to `[b h num_queries num_keys]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define dense()")

    def once(self, form: str, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` returns, computed at the first call for a form of this mask on a device and kept with the mask.

        Compiled code makes it at every call, and once for all that use it there.
        """
        if torch.compiler.is_compiling():
            return make()
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

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        offset = torch.tensor(num_keys - num_queries, device=device)
        return Rule(lambda row, head, query, key: key <= query + offset)


@dataclass(frozen=True)
class KeyMask(AttentionMask):
    """Keys that are padding, or of a dropped text, are seen by nobody.

    Args:
        keep: `[b k]` boolean, `False` where nobody looks.
        lengths: set by `prefix`.
    """

    keep: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def prefix(cls, lengths: Sequence[int], num_keys: int) -> KeyMask:
        """Row i keeps the first `lengths[i]` of its keys; known on the host, so that kernels for lengths can take it.

        Raises:
            ValueError: a length beyond the keys.
        """
        if not all(0 <= length <= num_keys for length in lengths):
            raise ValueError(f"lengths {list(lengths)} must lie between 0 and the {num_keys} keys")
        return cls(torch.arange(num_keys) < torch.tensor(lengths)[:, None], tuple(lengths))

    @property
    def hides_keys(self) -> bool:
        return True

    def check(self, num_queries: int, num_keys: int) -> None:
        if self.keep.shape[-1] != num_keys:
            raise ValueError(f"KeyMask covers {self.keep.shape[-1]} keys, the attention has {num_keys}")

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        self.check(num_queries, num_keys)
        return self.once("keep", device, lambda: self.keep.to(device))[:, None, None, :]  # [b 1 1 k]


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

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        mask = self.to(device)
        query_ranks, key_ranks, is_private = mask.query_ranks, mask.key_ranks, mask.is_private

        def allows(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query_rank = query_ranks[row, query] if query_ranks.ndim == 2 else query_ranks[query]
            key_rank = key_ranks[row, key] if key_ranks.ndim == 2 else key_ranks[key]
            return OrderMask.allows(query_rank, key_rank, None if is_private is None else is_private[key])

        return Rule(allows, self.batch_size)

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

    @property
    def is_additive(self) -> bool:
        return True

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return self.once(f"dense {num_keys}", device, lambda: self._dense(num_keys, device))

    def _dense(self, num_keys: int, device: torch.device) -> Tensor:
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

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        ids = self.sequence_ids(device)
        return Rule(lambda row, head, query, key: ids[query] == ids[key])


@dataclass(frozen=True)
class SelfMask(AttentionMask):
    """Every query sees the key at its own place, counted from the end; padding then attends to itself, not to nothing."""

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        places = torch.arange(num_keys - num_queries, num_keys, device=device)
        return (torch.arange(num_keys, device=device) == places[:, None])[None, None]  # [1 1 q k]

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        offset = torch.tensor(num_keys - num_queries, device=device)
        return Rule(lambda row, head, query, key: key == query + offset)


@dataclass(frozen=True)
class TreeMask(AttentionMask):
    """The queries are nodes of a tree, the keys a cache whose rows advance separately.

    Row i of the keys holds `lengths[i]` committed positions, then `t` nodes, then what nobody sees, as much as there is.
    The queries are the last `q` of the nodes; each sees the committed positions of its row, its ancestors and itself.

    Args:
        lengths: `[b]` int64.
        ancestors: `[b q t]` or `[1 q t]` boolean: node j is the query's node or above it.
        keep: `[b m]` boolean: which of the first `m` positions are seen, of those that are committed; `None`: all.
    """

    lengths: Tensor
    ancestors: Tensor
    keep: Tensor | None = None

    @property
    def hides_keys(self) -> bool:
        return True

    def check(self, num_queries: int, num_keys: int) -> None:
        _, most_queries, num_nodes = self.ancestors.shape
        if num_queries != most_queries or num_keys < num_nodes:
            raise ValueError(
                f"TreeMask covers {most_queries} queries and at least {num_nodes} keys, "
                f"the attention has {num_queries} and {num_keys}"
            )

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        self.check(num_queries, num_keys)
        return self.once(f"dense over {num_keys}", device, lambda: self._dense(num_keys, device))

    def _dense(self, num_keys: int, device: torch.device) -> Tensor:
        lengths, ancestors = self.lengths.to(device), self.ancestors.to(device)
        # Of each key, which node it is; negative: committed.
        node = torch.arange(num_keys, device=device) - lengths[:, None]  # [b k]
        last = ancestors.shape[2] - 1
        places = node.clamp(0, last)[:, None].expand(-1, ancestors.shape[1], -1)  # [b q k]
        is_above = ancestors.expand(len(lengths), -1, -1).gather(2, places) & (node <= last)[:, None]
        is_seen = node < 0
        if self.keep is not None:
            seen = min(num_keys, self.keep.shape[1])
            is_seen = is_seen & F.pad(self.keep[:, :seen].to(device), (0, num_keys - seen), value=True)
        return (is_above | is_seen[:, None])[:, None]  # [b 1 q k]


@dataclass(frozen=True)
class _Joined(AttentionMask):
    """Two boolean masks of the same queries and keys."""

    left: AttentionMask
    right: AttentionMask

    def __post_init__(self) -> None:
        for mask in (self.left, self.right):
            if mask.is_additive:
                raise ValueError(f"{type(mask).__name__} adds to logits, it cannot be joined with & or |")

    def check(self, num_queries: int, num_keys: int) -> None:
        self.left.check(num_queries, num_keys)
        self.right.check(num_queries, num_keys)


class EitherMask(_Joined):
    """A pair may attend where one of two boolean masks allows it."""

    @property
    def hides_keys(self) -> bool:
        return self.left.hides_keys and self.right.hides_keys

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        left = self.left.dense(num_queries, num_keys, device)
        return left | self.right.dense(num_queries, num_keys, device)

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        left = self.left.rule(num_queries, num_keys, device)
        return left | self.right.rule(num_queries, num_keys, device)


class BothMask(_Joined):
    """A pair may attend where both masks allow it."""

    @property
    def hides_keys(self) -> bool:
        return self.left.hides_keys or self.right.hides_keys

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        left = self.left.dense(num_queries, num_keys, device)
        return left & self.right.dense(num_queries, num_keys, device)

    def rule(self, num_queries: int, num_keys: int, device: torch.device) -> Rule:
        left = self.left.rule(num_queries, num_keys, device)
        return left & self.right.rule(num_queries, num_keys, device)
