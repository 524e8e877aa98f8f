"""What every image tokenizer offers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from vistok.models.identity import model_identity
from vistok.models.tokenizers.length_search import LengthChoice, PerceptualDistance, psnr, shortest_prefixes
from vistok.models.upstream.lpips import load_lpips
from vistok.tokens import Layout, Tokens, growing_prefixes

logger = logging.getLogger(__name__)

NumTokens = int | Sequence[int] | Tensor  # one length for all images, or one per image [b]


class ImageTokenizer(ModelMixin, ConfigMixin):
    """Images `[b 3 H W]` float in [-1, 1] <-> `Tokens`.

    A subclass sets the attributes below in its constructor and defines `encode_all` and `decode`.
    """

    image_size: int  # height and width in pixels
    patch_size: int = 1  # pixels per side of what one patch covers; a smaller picture holds nothing to encode
    num_tokens: int  # the most tokens an image can have
    codebook_size: int | None  # None for a continuous tokenizer
    variable_length: bool = False
    layout: Layout = Layout()

    def encode_all(self, images: Tensor, *args: Any, **options: Any) -> Tokens:
        """All tokens of `images [b 3 image_size image_size]` in [-1, 1]; a family names its own options."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode_all()")

    def decode(self, tokens: Tokens, *args: Any, **options: Any) -> Tensor:
        """Images `[b 3 image_size image_size]` in [-1, 1] of `tokens`; a family names its own options."""
        raise NotImplementedError(f"{type(self).__name__} does not define decode()")

    def encode(
        self,
        images: Tensor,
        num_tokens: NumTokens | None = None,
        *,
        target_psnr: float | None = None,
        target_lpips: float | None = None,
        max_tokens: int | None = None,
        perceptual_distance: PerceptualDistance | None = None,
        decode_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Tokens:
        """Tokens of images: all of them, a given number, or as many as each image needs.

        With a target, `choose_lengths` measures prefixes; an image that misses it with all tokens keeps all, and a
        warning is logged. Call `choose_lengths` yourself to learn which images those are.

        Args:
            images: `[b 3 image_size image_size]` in [-1, 1].
            num_tokens: keep this many tokens of every image, or of each image `[b]`.
            target_psnr, target_lpips, perceptual_distance, decode_options: see `choose_lengths`.
            max_tokens: no image gets more tokens than this, with a target and without.
            options: the family's own, see its `encode_all`.

        Raises:
            ValueError: more than one way to say the length, a length out of range, or a length or target for a
                tokenizer of fixed length.
        """
        has_target = target_psnr is not None or target_lpips is not None
        if num_tokens is not None and (has_target or max_tokens is not None):
            raise ValueError("give num_tokens, or a target and max_tokens, and not both")
        tokens = self.encode_all(images, **options)
        if not has_target:
            return self.limit(tokens, num_tokens if max_tokens is None else max_tokens)
        choice = self.choose_lengths(
            images,
            tokens,
            target_psnr=target_psnr,
            target_lpips=target_lpips,
            max_tokens=max_tokens,
            perceptual_distance=perceptual_distance,
            decode_options=decode_options,
        )
        if num_missed := int((~choice.is_met).sum()):
            logger.warning("%d of %d images miss the target with all their tokens", num_missed, len(tokens))
        return tokens.keep(choice.lengths)

    @torch.no_grad()
    def choose_lengths(
        self,
        images: Tensor,
        tokens: Tokens,
        *,
        target_psnr: float | None = None,
        target_lpips: float | None = None,
        max_tokens: int | None = None,
        perceptual_distance: PerceptualDistance | None = None,
        decode_options: Mapping[str, Any] | None = None,
    ) -> LengthChoice:
        """The shortest prefix of each image's tokens that meets a target; `length_search` says what is promised.

        Args:
            images: `[b 3 image_size image_size]` in [-1, 1], the originals.
            tokens: all their tokens.
            target_psnr: at least this many dB between the pictures as saved, with 8 bits.
            target_lpips: at most this distance; give either this or `target_psnr`.
            max_tokens: the longest prefix to try; all tokens by default.
            perceptual_distance: what `target_lpips` is measured with. By default LPIPS with VGG-16 (Zhang et al. 2018),
                whose weights are downloaded once.
            decode_options: options of `decode`. Every decode gets a copy of a `torch.Generator` in its present state,
                so all prefixes are drawn with the same noise, as is a later `decode` with that generator.

        Raises:
            ValueError: not exactly one target, a tokenizer of fixed length, or `max_tokens` out of range.
            FileNotFoundError: the weights of LPIPS are not here and cannot be downloaded.
        """
        if not self.variable_length:
            raise ValueError(
                f"{type(self).__name__} always uses {self.num_tokens} tokens: no length to choose"
            )
        if max_tokens is not None:
            tokens = tokens.keep(max_tokens)
        is_good = _target(images.to(self.device), target_psnr, target_lpips, perceptual_distance)

        def meets(lengths: Tensor) -> Tensor:
            decoded = self.decode(tokens.keep(lengths), **_with_copied_generators(decode_options or {}))
            return is_good(decoded.float())

        return shortest_prefixes(meets, len(tokens), tokens.data.shape[1])

    def decode_stream(
        self, tokens: Tokens, num_tokens: Sequence[int] | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """Images `[b 3 H W]` decoded from growing prefixes, coarse to fine; an image that has no more tokens stays.

        Args:
            tokens: what `encode` gave.
            num_tokens: the lengths of the prefixes; 1, 2, 4, ... and at last all tokens by default.
            options: those of `decode`; every prefix is drawn with the same noise, see `choose_lengths`.

        Raises:
            ValueError: a tokenizer of fixed length, or a prefix longer than the tokens.
        """
        if not self.variable_length:
            raise ValueError(f"{type(self).__name__} decodes only all {self.num_tokens} tokens of an image")
        longest = tokens.data.shape[1]
        if num_tokens is None:
            num_tokens = growing_prefixes(longest)
        prefixes = [tokens.keep(length) for length in num_tokens]
        return (self.decode(prefix, **_with_copied_generators(options)) for prefix in prefixes)

    def identity(self) -> str:
        """Class name and a hash of configuration and weights: which tokenizer made a file of tokens.

        Weights are hashed in bfloat16, so a half-precision copy has the identity of the original.
        """
        return model_identity(self)

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
            if tokens.data.shape[1] > self.num_tokens:
                raise ValueError(
                    f"{type(self).__name__} decodes 1 to {self.num_tokens} tokens per image, "
                    f"got {tokens.data.shape[1]}"
                )
        elif tokens.data.shape[1] != self.num_tokens or bool((counts != self.num_tokens).any()):
            raise ValueError(
                f"{type(self).__name__} decodes exactly {self.num_tokens} tokens per image, got "
                f"{sorted(set(counts.tolist()))}; it is not a variable-length tokenizer"
            )

    def limit(self, tokens: Tokens, num_tokens: NumTokens | None) -> Tokens:
        """`tokens.keep(num_tokens)` where this tokenizer decodes prefixes.

        Raises:
            ValueError: a prefix is asked for from a tokenizer of fixed length, or it is out of range.
        """
        if num_tokens is None:
            return tokens
        if not self.variable_length and bool((torch.as_tensor(num_tokens) != self.num_tokens).any()):
            raise ValueError(f"{type(self).__name__} always uses {self.num_tokens} tokens, not {num_tokens}")
        return tokens.keep(num_tokens)


def _target(
    images: Tensor,
    target_psnr: float | None,
    target_lpips: float | None,
    perceptual_distance: PerceptualDistance | None,
) -> Callable[[Tensor], Tensor]:
    """Reconstructions `[b 3 H W]` -> whether each is good enough, `[b]` boolean."""
    if any(target is not None and math.isnan(target) for target in (target_psnr, target_lpips)):
        raise ValueError("the target is not a number")
    if target_psnr is not None and target_lpips is None:
        return lambda reconstructions: psnr(reconstructions, images) >= target_psnr
    if target_lpips is not None and target_psnr is None:
        distance = perceptual_distance or load_lpips(device=images.device)
        return lambda reconstructions: distance(reconstructions, images) <= target_lpips
    raise ValueError("give either target_psnr or target_lpips")


def _with_copied_generators(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in options.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value
