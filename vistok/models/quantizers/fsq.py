"""Finite scalar quantisation (Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.models.quantizers.base import Quantizer, QuantizerOutput


class FSQ(Quantizer):
    """Every latent channel is bounded and rounded to one of `levels[i]` values; the codebook is their product.

    Codes lie in [-1, 1]. Index digits are little-endian: channel 0 varies fastest (section 3.1 of the paper).

    Args:
        levels: number of values per channel, each at least 2.

    Raises:
        ValueError: no level, or a level under 2.
    """

    def __init__(self, levels: list[int] | tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels must be a non-empty list of integers >= 2, got {list(levels)}")
        self.codebook_size = math.prod(levels)
        self.codebook_dim = len(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # on the CPU also where a model is built on the meta device: they are in no file that could fill them
        self.register_buffer("levels", torch.tensor(levels, device="cpu"), persistent=False)
        self.register_buffer("basis", torch.tensor(basis, device="cpu"), persistent=False)
        self.levels: Tensor
        self.basis: Tensor

    def _quantize(self, latents: Tensor) -> QuantizerOutput:
        bounded = self.bound(latents)
        rounded = bounded + (bounded.round() - bounded).detach()  # straight-through
        codes = rounded / self._half_width
        zero = codes.new_zeros(())
        return QuantizerOutput(codes, self.codes_to_indices(codes), zero, zero, zero)

    def bound(self, latents: Tensor) -> Tensor:
        """Squash channel i into an interval that holds exactly `levels[i]` integers (appendix A of the paper)."""
        half_range = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (self.levels + 1) % 2 * 0.5  # even levels round to -l/2 .. l/2 - 1
        shift = torch.atanh(offset / half_range)
        return (latents + shift).tanh() * half_range - offset

    @property
    def _half_width(self) -> Tensor:
        return self.levels // 2

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        digits = indices[..., None] // self.basis % self.levels  # [b n c]
        return (digits - self._half_width).float() / self._half_width

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        digits = (codes.float() * self._half_width).round().long() + self._half_width  # [b n c]
        return (digits * self.basis).sum(dim=-1)
