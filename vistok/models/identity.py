"""Which configuration and weights a model has, in one short string."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def model_identity(model: Any) -> str:
    """Class name of a diffusers model and a hash of its configuration and weights, 16 hexadecimal digits.

    Weights are hashed in bfloat16, so a half-precision copy has the identity of the original; so has a quantized one,
    which remembers it.
    """
    if (original := getattr(model, "original_identity", None)) is not None:
        return original
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        weights = tensor.detach().cpu().to(torch.bfloat16).contiguous()
        digest.update(weights.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{type(model).__name__}-{digest.hexdigest()[:16]}"
