"""The embedding of denoising times that DiT-like networks share (Peebles and Xie 2023)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbed(nn.Module):
    """Times -> vectors: cosines and sines at rates from 1 down to 1 / 10000, then two layers.

    Args:
        dim: width of the vectors.
        num_features: cosines and sines together.
    """

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.fc1 = nn.Linear(num_features, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """`[...]`, counted to 1000 -> `[... d]`; the features are float32, the layers of the dtype of the weights."""
        half = self.num_features // 2
        rates = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000.0) / half))
        angles = timesteps.float()[..., None] * rates  # [... half]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))
