"""Verifying drafted tokens: acceptance, what a rejection leaves of the target, and the draw as one operator."""

from vistok.kernels.verification.dispatch import verify_chain

__all__ = ["verify_chain"]
