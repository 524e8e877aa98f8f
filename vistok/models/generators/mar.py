"""MAR: a class-conditional masked generator of continuous tokens in random orders (Li et al. 2024,
"Autoregressive Image Generation without Vector Quantization").

An encoder reads the tokens that are decided, in front of them a buffer of tokens that all carry the class; a
decoder reads its features and mask tokens at all other positions. What it says at a position conditions a
small network (`heads.diffusion.Denoiser`) that draws the token there. Attention is bidirectional in both, and
every evaluation can decide any number of tokens; `vistok.decoding.mar_sampling` decides which.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.models.generators.base import ContinuousGenerator
from vistok.models.heads.diffusion import NORM_EPS, Denoiser, DiffusionHead
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache

PRESETS = {  # published name -> sizes
    "base": {"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12, "mlp_dim": 3072}
    | {"denoiser_dim": 1024, "denoiser_depth": 6},
    "large": {"dim": 1024, "encoder_depth": 16, "decoder_depth": 16, "num_heads": 16, "mlp_dim": 4096}
    | {"denoiser_dim": 1280, "denoiser_depth": 8},
    "huge": {"dim": 1280, "encoder_depth": 20, "decoder_depth": 20, "num_heads": 16, "mlp_dim": 5120}
    | {"denoiser_dim": 1536, "denoiser_depth": 12},
}
SAMPLING = {  # published name -> the authors' settings, with `LinearGuidance`
    "base": {"num_steps": 256, "num_inference_steps": 100, "guidance_scale": 2.9},
    "large": {"num_steps": 256, "num_inference_steps": 100, "guidance_scale": 3.0},
    "huge": {"num_steps": 256, "num_inference_steps": 100, "guidance_scale": 3.2},
}
MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25  # of the training, cut off below and at 1

Cache = KVCache | None


class MAR(ContinuousGenerator):
    """Class-conditional masked generator; `vistok.decoding.mar_sampling` draws from it.

    Args:
        latent_dim: channels of a token.
        latent_scale: what latents are multiplied by inside.
        num_tokens: tokens per image.
        layout: how they lie, as `str(Layout)`: `"16x16"`.
        num_classes: classes to condition on; the label `num_classes` means none.
        num_buffer_tokens: copies of the class in front of the tokens.
        dim: width.
        encoder_depth, decoder_depth: blocks of the two stacks.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLPs.
        denoiser_dim: width of the head.
        denoiser_depth: blocks of the head.
        dropout: in training, on the output of the attention, inside and on the output of the MLP.
        attention_dropout: in training, on the attention weights.

    Raises:
        ValueError: layout and `num_tokens` do not fit each other.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        latent_dim: int = 16,
        latent_scale: float = 0.2325,
        num_tokens: int = 256,
        layout: str = "16x16",
        num_classes: int = 1000,
        num_buffer_tokens: int = 64,
        dim: int = 768,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        denoiser_dim: int = 1024,
        denoiser_depth: int = 6,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            latent_dim=latent_dim,
            latent_scale=latent_scale,
            num_tokens=num_tokens,
            layout=layout,
            num_classes=num_classes,
        )
        if num_buffer_tokens < 1:
            raise ValueError(f"the class needs at least 1 buffer token, got {num_buffer_tokens}")
        self.layout.coordinates(num_tokens)  # raises where they do not fit
        self.num_buffer_tokens = num_buffer_tokens
        self.head = DiffusionHead()
        sizes = (num_buffer_tokens + num_tokens, dim, num_heads, mlp_dim, dropout, attention_dropout)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.latent_embed = nn.Linear(latent_dim, dim)
        self.latent_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.encoder = MARStack(encoder_depth, *sizes)
        self.between = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder = MARStack(decoder_depth, *sizes)
        self.condition_position = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.denoiser = Denoiser(latent_dim, dim, denoiser_dim, denoiser_depth)
        self.apply(_init_weights)
        for parameter in (self.mask_token, self.condition_position):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, latents: Tensor, class_labels: Tensor, is_hidden: Tensor) -> Tensor:
        """Training pass: the condition of every token, from those that are not hidden.

        Args:
            latents: `[b n c]`, scaled, in storage order; hidden ones are not read.
            class_labels: `[b]` int64, classes or `null_label`.
            is_hidden: `[b n]` boolean, equally many in each image.

        Returns:
            `[b n d]`, what `denoiser` is conditioned on.

        Raises:
            ValueError: a wrong shape, a label out of range, or different numbers of hidden tokens.
        """
        self.check_latents(latents)
        self.check_class_labels(class_labels, len(latents))
        counts = is_hidden.sum(dim=1)
        if is_hidden.shape != latents.shape[:2] or (counts != counts[:1]).any():
            raise ValueError(
                f"is_hidden must be {list(latents.shape[:2])} with equally many tokens hidden in each image, "
                f"got {list(is_hidden.shape)} with {counts.tolist()}"
            )
        positions = is_hidden.to(torch.uint8).argsort(dim=1, stable=True)  # [b n], decided ones first
        num_decided = self.num_tokens - (int(counts[0]) if len(counts) else self.num_tokens)
        decided, hidden = positions[:, :num_decided], positions[:, num_decided:]
        features = self.encode(take(latents, decided), decided, class_labels)
        conditions = self.decode(features, decided, hidden, num_last=self.num_tokens)
        return take(self.add_condition_positions(conditions, positions), positions.argsort(dim=1))

    def encode(
        self, latents: Tensor, positions: Tensor, class_labels: Tensor | None, cache: Cache = None
    ) -> Tensor:
        """Features of the class and of decided tokens.

        Args:
            latents: `[b v c]`, scaled.
            positions: `[b v]` int64, where they lie.
            class_labels: `[b]`; `None` if the cache has the buffer already.
            cache: of the encoder, with tokens that are seen and not evaluated again; those given are
                appended.

        Returns:
            `[b s+v d]`, of the buffer first, if it is not in the cache.
        """
        hidden_states = self.latent_embed(latents.to(self.dtype))
        if class_labels is not None:
            buffer = self.class_embed(class_labels)[:, None].expand(-1, self.num_buffer_tokens, -1)
            hidden_states = torch.cat([buffer, hidden_states], dim=1)  # [b s+v d]
        slots = self._slots(positions, with_buffer=class_labels is not None)
        hidden_states = self.encoder.add_positions(hidden_states, slots)
        return self.encoder(self.latent_norm(hidden_states), cache)

    def decode(
        self,
        features: Tensor,
        positions: Tensor,
        hidden: Tensor,
        cache: Cache = None,
        num_last: int | None = None,
    ) -> Tensor:
        """Features of everything, hidden tokens included.

        Args:
            features: `[b s+v d]` or `[b v d]`, from `encode`.
            positions: `[b v]` int64, where their tokens lie.
            hidden: `[b u]` int64, positions of mask tokens.
            cache: of the decoder, see `encode`.
            num_last: so many are asked for; all by default.

        Returns:
            `[b s+v+u d]` or `[b v+u d]`, those of the mask tokens last, or the last `num_last` of them;
            `add_condition_positions` makes conditions of them.
        """
        masks = self.mask_token.expand(*hidden.shape, -1)
        hidden_states = torch.cat([self.between(features), masks], dim=1)
        slots = self._slots(
            torch.cat([positions, hidden], dim=1), with_buffer=features.shape[1] > positions.shape[1]
        )
        return self.decoder(self.decoder.add_positions(hidden_states, slots), cache, num_last)

    def add_condition_positions(self, features: Tensor, positions: Tensor) -> Tensor:
        """Features `[b k d]` of the decoder at `positions [b k]` -> conditions of their tokens, `[b k d]`."""
        return features + self.condition_position[0, positions]

    def new_caches(self, batch_size: int) -> tuple[KVCache, KVCache]:
        """Empty caches of the encoder and of the decoder."""
        return self.encoder.new_cache(batch_size), self.decoder.new_cache(batch_size)

    def _slots(self, positions: Tensor, *, with_buffer: bool) -> Tensor:
        """Rows of the position embeddings, those of the buffer first: `[b v]` -> `[b s+v]` or `[b v]`."""
        slots = positions + self.num_buffer_tokens
        if not with_buffer:
            return slots
        buffer = torch.arange(self.num_buffer_tokens, device=positions.device).expand(len(positions), -1)
        return torch.cat([buffer, slots], dim=1)


class MARStack(nn.Module):
    """Bidirectional blocks over positions of their own, and a norm.

    Args:
        depth: blocks.
        num_slots: positions, those of the buffer included.
        dim, num_heads, mlp_dim, dropout, attention_dropout: of the blocks.
    """

    def __init__(
        self,
        depth: int,
        num_slots: int,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.position_embed = nn.Parameter(torch.randn(1, num_slots, dim) * 0.02)
        self.blocks = nn.ModuleList(
            MARBlock(dim, num_heads, mlp_dim, dropout, attention_dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.num_heads = num_heads

    def add_positions(self, hidden_states: Tensor, slots: Tensor) -> Tensor:
        """`[b m d]` and `[b m]` -> `[b m d]`."""
        return hidden_states + self.position_embed[0, slots]

    def forward(self, hidden_states: Tensor, cache: Cache = None, num_last: int | None = None) -> Tensor:
        """`[b m d]` -> `[b m d]`, or the last `[b num_last d]`; with a cache they also see what is in it."""
        layers: list[LayerCache] | list[None] = [None] * len(self.blocks) if cache is None else cache.layers
        for number, (block, layer) in enumerate(zip(self.blocks, layers, strict=True), start=1):
            # What the last block makes of the others, nobody reads.
            hidden_states = block(hidden_states, layer, num_last if number == len(self.blocks) else None)
        return self.norm(hidden_states)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for all slots."""
        _, num_slots, dim = self.position_embed.shape
        return KVCache(
            depth=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.num_heads,
            max_length=num_slots,
            head_dim=dim // self.num_heads,
            dtype=self.position_embed.dtype,
            device=self.position_embed.device,
        )


class MARBlock(nn.Module):
    """`x + attention(norm1(x))`, then `x + fc2(gelu(fc1(norm2(x))))`; LayerNorm eps 1e-6, exact GELU."""

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SelfAttention(dim, num_heads, dropout=attention_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: Tensor, cache: LayerCache | None = None, num_last: int | None = None
    ) -> Tensor:
        """`[b m d]` -> `[b m d]`, or the last `[b num_last d]`."""
        attended = self.attn(self.norm1(hidden_states), cache=cache, num_queries=num_last)
        hidden_states = hidden_states[:, -attended.shape[1] :] + self.dropout(attended)
        inner = self.dropout(F.gelu(self.fc1(self.norm2(hidden_states))))
        return hidden_states + self.dropout(self.fc2(inner))


def take(values: Tensor, positions: Tensor) -> Tensor:
    """`[b n c]` at `positions [b k]` -> `[b k c]`."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))


def mask_ratio(uniform: float, least: float = 0.7) -> float:
    """The share of tokens to hide in a batch, of a uniform draw in [0, 1).

    A normal distribution around 1, cut off below `least` and above 1 (MAR, section 4.2), by its inverse.

    Raises:
        ValueError: `least` is not in [0, 1).
    """
    if not 0 <= least < 1:
        raise ValueError(f"the least share of hidden tokens must be in [0, 1), got {least}")
    normal = torch.distributions.Normal(0.0, 1.0)
    low, high = (
        float(normal.cdf(torch.tensor((end - MASK_RATIO_MEAN) / MASK_RATIO_STD, dtype=torch.float64)))
        for end in (least, 1.0)
    )
    draw = float(normal.icdf(torch.tensor(low + uniform * (high - low), dtype=torch.float64)))
    return min(max(MASK_RATIO_MEAN + MASK_RATIO_STD * draw, least), 1.0)


def hide_tokens(orders: Tensor, ratio: float) -> Tensor:
    """Hide the first `ceil(ratio * n)` positions of every order.

    Args:
        orders: `[b n]` int64, a permutation of the positions per image.
        ratio: share in (0, 1].

    Returns:
        `[b n]` boolean.
    """
    count = math.ceil(ratio * orders.shape[1])
    is_hidden = torch.zeros_like(orders, dtype=torch.bool)
    return is_hidden.scatter(1, orders[:, :count], True)


def masked_diffusion_loss(
    model: MAR,
    latents: Tensor,
    class_labels: Tensor,
    is_hidden: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """The training loss: both terms of the diffusion loss, over the hidden tokens (MAR, section 3.2).

    The backbone runs once, the head several times, each time with timesteps and noise of its own.

    Args:
        model: in training mode.
        latents: `[b n c]`, what the tokenizer encodes, not scaled.
        class_labels: `[b]` int64; some of them `null_label`, for guidance.
        is_hidden: `[b n]` boolean, from `hide_tokens`.
        timesteps: `[r b n]` int64 in 0..999, for `r` repetitions; 4 in the release.
        noise: `[r b n c]`, standard normal.

    Returns:
        A scalar.
    """
    clean = latents.float() * model.latent_scale
    conditions = model(clean, class_labels, is_hidden)[is_hidden]  # [m d]
    clean, timesteps, noise = clean[is_hidden], timesteps[:, is_hidden], noise[:, is_hidden]  # [(r) m ...]
    prediction = model.denoiser(model.head.noised(clean, noise, timesteps), timesteps, conditions)  # [r m 2c]
    return model.head.loss(prediction, clean.expand_as(noise), noise, timesteps).mean()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Denoiser):  # after its layers: blocks begin as the identity, the output at zero
        for layer in (module.output, module.output_modulation, *module.block_modulations):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
