"""Vector quantisation (van den Oord et al. 2017), with the optional l2 normalisation of ViT-VQGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.models.quantizers.base import Quantizer, QuantizerOutput

ENTROPY_TEMPERATURE = 0.01  # squared distances are divided by it to become logits
ENTROPY_EPS = 1e-5  # inside the logarithm of the mean assignment, as LlamaGen has it


class VQ(Quantizer):
    """Nearest codebook row by squared Euclidean distance; the first one on ties.

    Args:
        codebook_size: rows.
        codebook_dim: width of a row.
        commitment_cost: weight of the commitment loss.
        entropy_cost: weight of `entropy_loss`, which keeps the whole codebook in use; 0 leaves it out.
        use_l2_norm: normalise latents and rows first (Yu et al. 2021, section 3.2); stored rows keep their norm.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        commitment_cost: float = 0.25,
        entropy_cost: float = 0.0,
        use_l2_norm: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.commitment_cost = commitment_cost
        self.entropy_cost = entropy_cost
        self.use_l2_norm = use_l2_norm
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        with torch.no_grad():
            self.embedding.weight.copy_(self._normalize(self.embedding.weight))

    def _quantize(self, latents: Tensor) -> QuantizerOutput:
        latents = self._normalize(latents)
        indices = self.codes_to_indices(latents)
        codes = self.indices_to_codes(indices)
        commitment_loss = self.commitment_cost * F.mse_loss(latents, codes.detach())
        codebook_loss = F.mse_loss(codes, latents.detach())
        loss = commitment_loss + codebook_loss
        if self.entropy_cost:
            loss = loss + self.entropy_cost * self.entropy_loss(latents)
        codes = latents + (codes - latents).detach()  # straight-through
        return QuantizerOutput(codes, indices, loss, commitment_loss, codebook_loss)

    def entropy_loss(self, latents: Tensor) -> Tensor:
        """Mean entropy of the soft assignments of `latents [b n codebook_dim]`, less the entropy of their mean.

        Low where every latent is sure of its code and all codes are used alike (Yu et al. 2024, "Language Model Beats
        Diffusion", section 3.1).
        """
        logits = -self._distances(latents.float().flatten(0, 1)) / ENTROPY_TEMPERATURE  # [b*n v]
        shares = logits.softmax(dim=-1)
        entropy = -(shares * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        usage = shares.mean(dim=0)  # [v]
        return entropy + (usage * (usage + ENTROPY_EPS).log()).sum()

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self._normalize(self.embedding(indices).float())

    @torch.no_grad()
    def codes_to_indices(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            return self._distances(codes.float()).argmin(dim=-1)

    def _distances(self, latents: Tensor) -> Tensor:
        """Squared distances of `latents [... c]` to all rows, less what is the same for all of them: `[... v]`."""
        latents, codebook = self._normalize(latents), self._normalize(self.embedding.weight.float())
        return codebook.square().sum(dim=1) - 2 * latents @ codebook.T

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.use_l2_norm else vectors
