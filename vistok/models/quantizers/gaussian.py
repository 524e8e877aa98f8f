"""The diagonal Gaussian posterior of continuous tokenizers (Kingma & Welling 2014, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian per latent channel; computed in float32."""

    mean: Tensor  # [b n c]
    logvar: Tensor  # [b n c]

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> DiagonalGaussian:
        """Means, then log-variances, along the last axis: `[b n 2c]`. Log-variances are clamped to [-30, 20]."""
        mean, logvar = parameters.float().chunk(2, dim=-1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviations `[b n c]`."""
        return (self.logvar / 2).exp()

    @property
    def mode(self) -> Tensor:
        """The most likely latents `[b n c]`: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Latents `[b n c]` for standard normal `noise [b n c]`."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal per token, `[b n]`."""
        return (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=-1) / 2
