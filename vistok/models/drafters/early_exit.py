"""Early exit: the first blocks of a generator and a small adapter draft for the whole of it (Liu et al. 2024, "Kangaroo:
Lossless Self-Speculative Decoding via Double Early Exiting", section 3).

Only the adapter is trained: normalised self-attention without an MLP, added to the stream. The embeddings, the blocks in
front of it, the last norm and the head are the generator's own.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vistok.models.generators.base import NextTokenGenerator
from vistok.models.layers.attention import SelfAttention
from vistok.models.layers.norm import RMSNorm

Model = TypeVar("Model", bound=NextTokenGenerator)


class EarlyExitAdapter(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Stands in for all blocks of a generator after the first `num_blocks`.

    Args:
        codebook_size: image token ids of the generator.
        num_blocks: blocks of the generator in front of the adapter.
        dim: width of the generator.
        num_heads: attention heads, as many as the generator has.
        target: `model_identity` of the generator, where that is known.

    Raises:
        ValueError: `num_blocks` is below 1.
    """

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        num_blocks: int = 2,
        dim: int = 256,
        num_heads: int = 4,
        target: str | None = None,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.codebook_size = codebook_size
        self.num_blocks = num_blocks
        self.norm = RMSNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, out_bias=False, qk_norm=True)
        nn.init.zeros_(self.attn.proj.weight)  # at first the stream passes as it is

    @classmethod
    def for_target(cls, target: NextTokenGenerator, num_blocks: int) -> EarlyExitAdapter:
        """An untrained one.

        Raises:
            ValueError: `num_blocks` is below 1 or not below the depth of the target.
        """
        adapter = cls(
            codebook_size=target.codebook_size,
            num_blocks=num_blocks,
            dim=target.config["dim"],
            num_heads=target.config["num_heads"],
        )
        adapter.check_target(target)
        return adapter.to(target.device, target.dtype)

    def check_target(self, target: NextTokenGenerator) -> None:
        """Raises ValueError unless the adapter was made for a generator such as `target`."""
        name, depth = type(target).__name__, len(_blocks(target))
        if self.num_blocks >= depth:
            raise ValueError(
                f"num_blocks must be in 1..{depth - 1} for a {name} of {depth} blocks, got {self.num_blocks}"
            )
        for size in ("codebook_size", "dim", "num_heads"):
            if self.config[size] != target.config[size]:
                raise ValueError(
                    f"the adapter was made for {size} {self.config[size]}, this {name} has {target.config[size]}: "
                    "use the adapter that was trained for it"
                )
        if target.config.get("num_kv_heads") not in (None, self.config["num_heads"]):
            raise ValueError(
                f"this {name} shares heads of keys and values, which an early exit cannot follow"
            )

    def forward(self, hidden_states: Tensor, *context: Any) -> Tensor:
        """As a block of the generator: `[b n d]` -> `[b n d]`.

        Args:
            hidden_states: the stream after the first blocks.
            context: what a block of the generator is given besides; it ends with the mask and the layer's cache.
        """
        mask, cache = context[-2:]
        return hidden_states + self.attn(self.norm(hidden_states), mask, cache)


def with_early_exit(target: Model, adapter: EarlyExitAdapter) -> Model:
    """A generator of the same kind with the first blocks of `target`, then the adapter; all weights are shared.

    Raises:
        ValueError: the adapter was made for another target.
    """
    adapter.check_target(target)
    model = copy.copy(target)
    blocks = nn.ModuleList([*_blocks(target)[: adapter.num_blocks], adapter])
    model._modules = {**target._modules, "blocks": blocks}  # the copy would share the dictionary as well
    return model


def _blocks(target: NextTokenGenerator) -> nn.ModuleList:
    assert isinstance(target.blocks, nn.ModuleList)
    return target.blocks
