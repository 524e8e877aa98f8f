"""What every quantizer offers: latents <-> codes <-> indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class QuantizerOutput:
    """Result of `Quantizer.quantize`."""

    codes: Tensor  # [b n c] quantised vectors; gradients pass straight through to the latents
    indices: Tensor  # [b n] int64
    loss: Tensor  # scalar, 0 for quantisers without one
    commitment_loss: Tensor  # scalar part of `loss`, weight included
    codebook_loss: Tensor  # scalar part of `loss`


class Quantizer(nn.Module):
    """Turns latents `[b n c]` into codes and indices. Runs in float32 with autocast off."""

    codebook_size: int
    codebook_dim: int

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Nearest codes of `latents [b n codebook_dim]`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents.float())

    def _quantize(self, latents: Tensor) -> QuantizerOutput:
        raise NotImplementedError(f"{type(self).__name__} does not define _quantize()")

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """`[b n]` int64 -> `[b n codebook_dim]` float32."""
        raise NotImplementedError(f"{type(self).__name__} does not define indices_to_codes()")

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """`[b n codebook_dim]`, vectors of the codebook, -> `[b n]` int64."""
        raise NotImplementedError(f"{type(self).__name__} does not define codes_to_indices()")

    @property
    def codebook(self) -> Tensor:
        """All codes in index order, `[codebook_size codebook_dim]` float32."""
        device = next(iter([*self.parameters(), *self.buffers()])).device
        return self.indices_to_codes(torch.arange(self.codebook_size, device=device)[None])[0]
