"""The diffusion head: a token is drawn by reversing a chain of noising steps, as in MAR (Li et al. 2024,
section 3).

`Denoiser` is the small network: from a noised token, its timestep and a condition it predicts the noise and,
for every channel, where the variance of the reverse step lies between its two bounds (Nichol and Dhariwal
2021, section 3.1). `Chain` holds the tables of a chain, the full one of 1000 steps or a respaced one,
`DiffusionHead` learns and samples with them. Timesteps run from 0, almost clean, to 999, pure noise.

diffusers' `DDPMScheduler` walks the same chain, but keeps its tables in float32 (off by 1.3e-5 of their value
at timestep 999, which comes back 2e4 times as large), has neither a temperature nor given noise, and bounds
the variance of the last step differently, on which continuous speculative decoding depends. So the chain is
ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.models.heads.base import Draw, Predict
from vistok.models.layers.time_embed import TimeEmbed

NUM_TIMESTEPS = 1000
NORM_EPS = 1e-6
HALF_BIN = 1 / 255  # of the likelihood at timestep 0: values in [-1, 1], as if they had 256 levels
EDGE = 0.999  # beyond it a bin reaches to infinity

Modulation = tuple[list[Tensor], Tensor]  # per block [... 3w], of the last layer [... 2w]


class Denoiser(nn.Module):
    """An MLP of residual blocks that timestep and condition shift, scale and gate (MAR, appendix B).

    The residual stream, the first and the last layer are float32 whatever the weights and autocast are: at
    timestep 999 an error of the predicted noise comes back 2e4 times as large in the token.

    Args:
        latent_dim: channels of a token.
        condition_dim: width of the condition.
        dim: width.
        depth: blocks.
    """

    def __init__(self, latent_dim: int, condition_dim: int, dim: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbed(dim)
        self.condition_embed = nn.Linear(condition_dim, dim)
        self.input = nn.Linear(latent_dim, dim)
        self.blocks = nn.ModuleList(DenoiserBlock(dim) for _ in range(depth))
        self.block_modulations = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.output_modulation = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, 2 * latent_dim)

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """`noisy [... c]`, `timesteps [...]`, `conditions [... z]` -> noise, variances `[... 2c]` float32."""
        return self.denoise(noisy, self.modulate(self.embed_conditions(conditions), timesteps))

    def embed_conditions(self, conditions: Tensor) -> Tensor:
        """What the timesteps of a chain share: `[... z]` -> `[... w]`."""
        return self.condition_embed(conditions.to(self.condition_embed.weight.dtype))

    def modulate(self, embedded: Tensor, timesteps: Tensor) -> Modulation:
        """Shifts, scales and gates of all layers, from embedded conditions and timesteps that broadcast."""
        modulated = F.silu(self.time_embed(timesteps) + embedded)
        return [layer(modulated) for layer in self.block_modulations], self.output_modulation(modulated)

    def denoise(self, noisy: Tensor, modulation: Modulation) -> Tensor:
        """`noisy [... c]`, modulated -> noise and variance values `[... 2c]`, float32."""
        hidden_states = _linear_float32(self.input, noisy)
        of_blocks, (shift, scale) = modulation[0], modulation[1].chunk(2, dim=-1)
        for block, of_block in zip(self.blocks, of_blocks, strict=True):
            hidden_states = block(hidden_states, of_block)
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)
        return _linear_float32(self.output, normed * (1 + scale.float()) + shift.float())


class DenoiserBlock(nn.Module):
    """`h + gate * mlp(norm(h) * (1 + scale) + shift)`; the MLP is as wide as the stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        """`hidden_states [... w]` float32, `modulation [... 3w]` -> `[... w]` float32."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        normed = F.layer_norm(hidden_states, weight.shape, weight, bias, NORM_EPS).to(modulation.dtype)
        inner = self.fc2(F.silu(self.fc1(normed * (1 + scale) + shift)))
        return hidden_states + gate * inner


def _linear_float32(layer: nn.Linear, values: Tensor) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return F.linear(values.float(), layer.weight.float(), layer.bias.float())


@dataclass(frozen=True)
class Gaussian:
    """A reverse step; float32."""

    mean: Tensor  # [... c]
    log_variance: Tensor  # [... c], or what goes with it where all channels have the same


@dataclass(frozen=True)
class Trajectory:
    """A token as the end of its chain; all `[... c]` float32.

    The last step takes no noise, so the mean is the token. Continuous speculative decoding needs what else
    there is.
    """

    mean: Tensor
    std: Tensor  # that the last step would have, temperature included
    log_std_sum: Tensor  # over all other steps, without temperature


@dataclass(frozen=True, eq=False)
class Chain:
    """The tables of a chain of noising steps, float64 on the CPU; the steps count from the cleanest.

    Args:
        timesteps: `[k]` int64, ascending, of the full chain; what the network is told.
        alpha_bars: `[k]`, the share of the token's variance that is left after each step.
    """

    timesteps: Tensor
    alpha_bars: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @functools.cached_property
    def times(self) -> list[float]:
        """The timesteps as the network is told them in a loop."""
        return self.timesteps.double().tolist()

    @functools.cached_property
    def alpha_bars_before(self) -> Tensor:
        """`alpha_bars` before each step."""
        return torch.cat([self.alpha_bars.new_ones(1), self.alpha_bars[:-1]])

    @functools.cached_property
    def betas(self) -> Tensor:
        """Variance of the noise of each step; in the full chain the cosine schedule, not more than 0.999."""
        return 1 - self.alpha_bars / self.alpha_bars_before

    @functools.cached_property
    def mean_factors(self) -> tuple[Tensor, Tensor]:
        """Of the token and of the noised token, in the mean of the posterior (Ho et al. 2020, equation 7)."""
        left = 1 - self.alpha_bars
        of_token = self.betas * self.alpha_bars_before.sqrt() / left
        of_noised = (1 - self.alpha_bars_before) * (1 - self.betas).sqrt() / left
        return of_token, of_noised

    @functools.cached_property
    def posterior_log_variances(self) -> Tensor:
        """The lower bound of the variance; that of the first step would be 0 and is that of the second."""
        variances = self.betas * (1 - self.alpha_bars_before) / (1 - self.alpha_bars)
        return variances[[1, *range(1, len(variances))]].log()

    @functools.cached_property
    def token_factors(self) -> tuple[Tensor, Tensor]:
        """`token = first * noised - second * noise`."""
        return self.alpha_bars.rsqrt(), (1 / self.alpha_bars - 1).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """`clean` and `noise [... c]`, noised up to the steps `indices [...]`."""
        kept, added = _at(self.alpha_bars.sqrt(), indices), _at((1 - self.alpha_bars).sqrt(), indices)
        return kept * clean + added * noise

    def posterior(self, clean: Tensor, noised: Tensor, indices: int | Tensor) -> Gaussian:
        """The step back when the token is known: everything `[... c]`, indices `[...]` or one for all."""
        of_token, of_noised = (_at(factor, indices) for factor in self.mean_factors)
        return Gaussian(of_token * clean + of_noised * noised, _at(self.posterior_log_variances, indices))

    def reverse(self, prediction: Tensor, noised: Tensor, indices: int | Tensor) -> Gaussian:
        """The step back that a network predicts; nothing is clipped.

        Args:
            prediction: `[... 2c]`, noise and variance values.
            noised: `[... c]`.
            indices: of the step, one for all or `[...]`.
        """
        noise, values = prediction.float().chunk(2, dim=-1)
        of_noised, of_noise = (_at(factor, indices) for factor in self.token_factors)
        step = self.posterior(of_noised * noised - of_noise * noise, noised, indices)
        share, most = (values + 1) / 2, _at(self.betas.log(), indices)
        return Gaussian(step.mean, share * most + (1 - share) * step.log_variance)


def _at(table: Tensor, indices: int | Tensor) -> Tensor:
    """Entries of a float64 table as float32: `[... 1]` beside the indices, or a number for any device."""
    if isinstance(indices, int):
        return table[indices].float()
    return table.float().to(indices.device)[indices][..., None]


@functools.cache
def full_chain() -> Chain:
    """The cosine schedule (Nichol and Dhariwal 2021, equation 17) over 1000 steps."""
    steps = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
    left = ((steps + 0.008) / 1.008 * math.pi / 2).cos().square()
    betas = (1 - left[1:] / left[:-1]).clamp_max(0.999)
    return Chain(torch.arange(NUM_TIMESTEPS), (1 - betas).cumprod(dim=0))


@functools.lru_cache(maxsize=256)
def respaced_chain(timesteps: tuple[int, ...]) -> Chain:
    """The chain over some timesteps of the full one, which leads through the same noise levels."""
    kept = torch.tensor(timesteps)
    return Chain(kept, full_chain().alpha_bars[kept])


def spread_timesteps(counts: Sequence[int], last_timestep: int = NUM_TIMESTEPS - 1) -> tuple[int, ...]:
    """Evenly spread timesteps, ascending.

    Args:
        counts: how many in each of `len(counts)` equal sections of the 1000 timesteps, its first and last
            among them.
        last_timestep: what lies above is moved down to it; timesteps that meet there become one.

    Raises:
        ValueError: a section has fewer timesteps than it shall give.
    """
    size, longer = divmod(NUM_TIMESTEPS, len(counts))
    chosen: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 0 <= count <= length:
            raise ValueError(f"{length} timesteps cannot give {count} denoising steps; ask for 0 to {length}")
        stride, position = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            chosen.add(min(start + round(position), last_timestep))
            position += stride  # summed up, as in the release: a product rounds differently here and there
        start += length
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class LossTerms:
    """What a `Denoiser` is trained with; both `[...]` float32, means over the channels."""

    mse: Tensor
    variational: Tensor  # bits; it trains the variances alone


@dataclass(frozen=True)
class DiffusionHead:
    """A `ContinuousHead` over predicted noise; it has no weights. Times are timesteps, 0 to 999.

    Args:
        temperature: factor on the noise of the steps, but not on that of the start.
        last_timestep: where chains begin; 950 in DiSA, which spares the step that multiplies errors by 2e4.
        shares: how the steps of a chain are shared out over equal sections of the timesteps, cleanest first;
            evenly over all of them by default.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    last_timestep: int = NUM_TIMESTEPS - 1
    shares: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.last_timestep < NUM_TIMESTEPS:
            raise ValueError(f"last_timestep must be in 1..{NUM_TIMESTEPS - 1}, got {self.last_timestep}")
        if not self.shares or min(self.shares) < 0 or sum(self.shares) < 1:
            raise ValueError(f"shares must be at least 0, and not all 0, got {self.shares}")

    @property
    def guidance_space(self) -> str:
        return "noise"

    def chain(self, num_inference_steps: int) -> Chain:
        """The chain of so many steps; fewer where `last_timestep` lets some of them meet.

        Raises:
            ValueError: fewer than 2 steps, more than there are, or a number that `shares` cannot share out.
        """
        if num_inference_steps < 2:
            raise ValueError(
                "a chain needs at least 2 denoising steps, from the noisiest and to the cleanest; "
                f"got {num_inference_steps}"
            )
        counts = [num_inference_steps * share / sum(self.shares) for share in self.shares]
        if any(not count.is_integer() for count in counts):
            raise ValueError(f"{num_inference_steps} denoising steps cannot be shared out as {self.shares}")
        return respaced_chain(spread_timesteps([int(count) for count in counts], self.last_timestep))

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """`clean` and `noise [... c]`, `times [...]` int64 timesteps -> `[... c]`."""
        return full_chain().noised(clean.float(), noise.float(), times)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The sum of `loss_terms`."""
        terms = self.loss_terms(prediction, clean, noise, times)
        return terms.mse + terms.variational

    def loss_terms(self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> LossTerms:
        """Both terms of the loss, over the full chain (Nichol and Dhariwal 2021, section 3.1).

        Args:
            prediction: `[... 2c]`, what the network said of `noised(clean, noise, times)`.
            clean: `[... c]`.
            noise: `[... c]`.
            times: `[...]` int64 timesteps.
        """
        clean, noise, prediction = clean.float(), noise.float(), prediction.float()
        predicted, values = prediction.chunk(2, dim=-1)
        noised, chain = self.noised(clean, noise, times), full_chain()
        step = chain.reverse(torch.cat([predicted.detach(), values], dim=-1), noised, times)
        divergence = _kl_divergence(chain.posterior(clean, noised, times), step).mean(dim=-1)
        likelihood = -_log_likelihood(clean, step).mean(dim=-1)
        variational = torch.where(times == 0, likelihood, divergence) / math.log(2)
        return LossTerms((noise - predicted).square().mean(dim=-1), variational)

    def sample(self, predict: Predict, draw: Draw, *, num_inference_steps: int) -> Tensor:
        """See `ContinuousHead.sample`; the state of the chain is float32."""
        return self.trajectory(predict, draw, num_inference_steps=num_inference_steps).mean

    def trajectory(self, predict: Predict, draw: Draw, *, num_inference_steps: int) -> Trajectory:
        """As `sample`, with the variances along the way. The start and all steps but the last draw noise."""
        chain = self.chain(num_inference_steps)
        state = draw(torch.float32)
        log_std_sum = torch.zeros_like(state)
        for index in range(len(chain) - 1, 0, -1):
            step = chain.reverse(predict(state, chain.times[index]), state, index)
            log_std = step.log_variance / 2
            log_std_sum = log_std_sum + log_std
            state = step.mean + log_std.exp() * draw(torch.float32) * self.temperature
        step = chain.reverse(predict(state, chain.times[0]), state, 0)
        return Trajectory(step.mean, (step.log_variance / 2).exp() * self.temperature, log_std_sum)


def _kl_divergence(first: Gaussian, second: Gaussian) -> Tensor:
    """`KL(first | second)` of every channel, in nats."""
    difference = first.log_variance - second.log_variance
    distance = (first.mean - second.mean).square() * (-second.log_variance).exp()
    return (difference.exp() - difference - 1 + distance) / 2


def _log_likelihood(clean: Tensor, step: Gaussian) -> Tensor:
    """Logarithm of the probability that a step gives the bin around `clean` (Ho et al. 2020, equation 13)."""
    precision = (-step.log_variance / 2).exp()
    below_upper = _normal_cdf((clean - step.mean + HALF_BIN) * precision)
    below_lower = _normal_cdf((clean - step.mean - HALF_BIN) * precision)
    within = torch.where(clean > EDGE, 1 - below_lower, below_upper - below_lower)
    return torch.where(clean < -EDGE, below_upper, within).clamp_min(1e-12).log()


def _normal_cdf(values: Tensor) -> Tensor:
    """The standard normal distribution function, as the released models approximate it."""
    return (1 + (math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)).tanh()) / 2
