"""Weights for measurements of time and memory, which do not depend on them."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import nn

INIT_STD = 0.02
Model = TypeVar("Model")  # an `nn.Module`, which mypy cannot see in diffusers' classes


@torch.no_grad()
def randomize(model: Model) -> Model:
    """Give weights that are all zero random values, so that all layers compute; biases and norms stay."""
    for module in cast(nn.Module, model).modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.normal_(std=INIT_STD)
    return model
