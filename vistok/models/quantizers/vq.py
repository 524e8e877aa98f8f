"""Vector quantisation (van den Oord et al. 2017), with the optional l2 normalisation of ViT-VQGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.models.quantizers.base import Quantizer, QuantizerOutput


class VQ(Quantizer):
    """Nearest codebook row by squared Euclidean distance; the first one on ties.

    Args:
        codebook_size: rows.
        codebook_dim: width of a row.
        commitment_cost: weight of the commitment loss.
        use_l2_norm: normalise latents and rows first (Yu et al. 2021, section 3.2); stored rows keep their norm.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.commitment_cost = commitment_cost
        self.use_l2_norm = use_l2_norm
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def _quantize(self, latents: Tensor) -> QuantizerOutput:
        latents = self._normalize(latents)
        indices = self.codes_to_indices(latents)
        codes = self.indices_to_codes(indices)
        commitment_loss = self.commitment_cost * F.mse_loss(latents, codes.detach())
        codebook_loss = F.mse_loss(codes, latents.detach())
        codes = latents + (codes - latents).detach()  # straight-through
        return QuantizerOutput(
            codes, indices, commitment_loss + codebook_loss, commitment_loss, codebook_loss
        )

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self._normalize(self.embedding(indices).float())

    @torch.no_grad()
    def codes_to_indices(self, codes: Tensor) -> Tensor:
        codes, codebook = self._normalize(codes.float()), self._normalize(self.embedding.weight.float())
        # |z|^2 + |e|^2 - 2 z.e, without |z|^2 which does not change the order  # [b n v]
        distances = codebook.square().sum(dim=1) - 2 * codes @ codebook.T
        return distances.argmin(dim=-1)

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.use_l2_norm else vectors
