"""What every image tokenizer offers."""

from __future__ import annotations

import hashlib
import json

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from vistok.tokens import Layout, Tokens


class ImageTokenizer(ModelMixin, ConfigMixin):
    """Images `[b 3 H W]` float in [-1, 1] <-> `Tokens`.

    A subclass sets the attributes below in its constructor and defines `encode` and `decode`.
    """

    image_size: int  # height and width in pixels
    patch_size: int = 1  # pixels per side of what one patch covers; a smaller picture holds nothing to encode
    num_tokens: int  # the most tokens an image can have
    codebook_size: int | None  # None for a continuous tokenizer
    variable_length: bool = False
    layout: Layout = Layout()

    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tokens:
        """Tokens of `images [b 3 image_size image_size]` in [-1, 1]; the first `num_tokens` where that is allowed."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode()")

    def decode(self, tokens: Tokens) -> Tensor:
        """Images `[b 3 image_size image_size]` in [-1, 1] of `tokens`."""
        raise NotImplementedError(f"{type(self).__name__} does not define decode()")

    def identity(self) -> str:
        """Class name and a hash of configuration and weights: which tokenizer made a file of tokens.

        Weights are hashed in bfloat16, so a half-precision copy has the identity of the original.
        """
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(
                tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
            )
        return f"{type(self).__name__}-{digest.hexdigest()[:16]}"

    @property
    def codebook(self) -> Tensor:
        """All codes in index order, `[codebook_size codebook_dim]`; discrete tokenizers only."""
        raise ValueError(f"{type(self).__name__} has no codebook: its tokens are continuous")

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless `images` is what `encode` takes: shape, dtype and range."""
        expected = f"[b 3 {self.image_size} {self.image_size}]"
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"{type(self).__name__} takes images {expected}, got {list(images.shape)}; "
                "vistok.data.load_image resizes and crops"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.numel() and (not torch.isfinite(images).all() or images.abs().max() > 1 + 1e-3):
            raise ValueError(
                "images must be finite and lie in [-1, 1]; scale uint8 with `images / 127.5 - 1`"
            )

    def check_tokens(self, tokens: Tokens) -> None:
        """Raises ValueError unless `tokens` can be decoded here: kind, codebook, layout and lengths."""
        if tokens.is_discrete != (self.codebook_size is not None):
            kinds = {True: "codebook indices", False: "continuous latents"}
            raise ValueError(f"{type(self).__name__} does not decode {kinds[tokens.is_discrete]}")
        if tokens.codebook_size != self.codebook_size:
            raise ValueError(
                f"these tokens point into a codebook of {tokens.codebook_size}, "
                f"{type(self).__name__} has {self.codebook_size}: they come from another tokenizer"
            )
        if tokens.layout != self.layout:
            raise ValueError(
                f"tokens are laid out as {tokens.layout}, {type(self).__name__} uses {self.layout}"
            )
        self._check_lengths(tokens)

    def _check_lengths(self, tokens: Tokens) -> None:
        counts = tokens.token_counts
        if self.variable_length:
            if tokens.data.shape[1] > self.num_tokens or (counts.numel() and int(counts.min()) < 1):
                raise ValueError(f"{type(self).__name__} decodes 1 to {self.num_tokens} tokens per image")
        elif tokens.data.shape[1] != self.num_tokens or bool((counts != self.num_tokens).any()):
            raise ValueError(
                f"{type(self).__name__} decodes exactly {self.num_tokens} tokens per image, got "
                f"{sorted(set(counts.tolist()))}; it is not a variable-length tokenizer"
            )

    def limit(self, tokens: Tokens, num_tokens: int | None) -> Tokens:
        """`tokens.keep(num_tokens)` where this tokenizer decodes prefixes.

        Raises:
            ValueError: a prefix is asked for from a tokenizer of fixed length, or it is out of range.
        """
        if num_tokens is None or num_tokens == self.num_tokens:
            return tokens
        if not self.variable_length:
            raise ValueError(f"{type(self).__name__} always uses {self.num_tokens} tokens, not {num_tokens}")
        return tokens.keep(num_tokens)
