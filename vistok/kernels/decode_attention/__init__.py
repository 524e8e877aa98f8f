"""Attention of new positions over a cache that is allocated once, and the cache's growth by them."""

from vistok.kernels.decode_attention.dispatch import decode_attention

__all__ = ["decode_attention"]
