"""Typed attention masks: what may attend to what, independent of the backend that computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class AttentionMask:
    """Base of all masks. `dense` is the definition; a backend may use a cheaper form of the same mask."""

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean mask, `True` means attend, broadcastable to `[b h num_queries num_keys]`."""
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
class BothMask(AttentionMask):
    """A pair may attend where both masks allow it."""

    left: AttentionMask
    right: AttentionMask

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        left = self.left.dense(num_queries, num_keys, device)
        return left & self.right.dense(num_queries, num_keys, device)
