"""Attention: one operator, several backends."""

from vistok.kernels.attention.dispatch import attention, attention_backend
from vistok.kernels.attention.masks import AttentionMask, CausalMask, KeyMask

__all__ = ["AttentionMask", "CausalMask", "KeyMask", "attention", "attention_backend"]
