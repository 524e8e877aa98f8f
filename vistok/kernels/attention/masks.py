"""Typed attention masks: what may attend to what, independent of the backend that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class AttentionMask:
    """Base of all masks. `dense` is the definition; a backend may use a cheaper form of the same mask."""

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean, `True` means attend, or values added to the logits; broadcasts to `[b h num_queries num_keys]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define dense()")

    def __and__(self, other: AttentionMask) -> AttentionMask:
        return BothMask(self, other)


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
class BothMask(AttentionMask):
    """A pair may attend where both masks allow it."""

    left: AttentionMask
    right: AttentionMask

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        left = self.left.dense(num_queries, num_keys, device)
        return left & self.right.dense(num_queries, num_keys, device)
