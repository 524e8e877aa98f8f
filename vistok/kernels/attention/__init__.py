"""Attention: one operator, several backends."""

from vistok.kernels.attention.dispatch import attention, attention_backend
from vistok.kernels.attention.masks import (
    AttentionMask,
    CausalMask,
    KeyMask,
    LastKeyRepeats,
    OrderMask,
    PackedMask,
    SelfMask,
    TreeMask,
)
from vistok.kernels.attention.packing import pack, unpack

__all__ = [
    "AttentionMask",
    "CausalMask",
    "KeyMask",
    "LastKeyRepeats",
    "OrderMask",
    "PackedMask",
    "SelfMask",
    "TreeMask",
    "attention",
    "attention_backend",
    "pack",
    "unpack",
]
