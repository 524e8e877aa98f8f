"""What every head of a continuous generator offers.

A categorical head has logits, a cross-entropy and `vistok.decoding.sampling.sample`. Over continuous tokens the same three
things are a network that is asked many times per token, a regression on noised tokens, and an integration from noise to a
token. The network is not part of this interface: it may be the whole generator (xAR) or a small MLP (MAR).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Fresh standard normal draws `[b k c]` of a dtype, on the device of the model.
Draw = Callable[[torch.dtype], Tensor]


class Predict(Protocol):
    """A network with its condition filled in, and guided where guidance is on."""

    def __call__(self, noisy: Tensor, time: float) -> Tensor:
        """`noisy [b k c]`, all at one `time` -> what the head's network says of them, `[b k c']`."""
        ...


class ContinuousHead(Protocol):
    """How a continuous token is noised, learned and drawn. Times grow with the noise; their unit is the head's own."""

    @property
    def guidance_space(self) -> str:
        """What the network predicts and guidance moves: `"velocity"` or `"noise"`."""
        ...

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Tokens `clean` with as much of `noise` (both `[b n c]`) as `times [b n]` say, `[b n c]`."""
        ...

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network should have said of `noised(clean, noise, times)`: the loss per token, `[b n]` float32."""
        ...

    def sample(self, predict: Predict, draw: Draw, *, num_inference_steps: int) -> Tensor:
        """Draw tokens `[b k c]`.

        Args:
            predict: the guided network.
            draw: starting noise first, then what the steps need.
            num_inference_steps: evaluations of the network.

        Raises:
            ValueError: fewer steps than the sampler needs.
        """
        ...
