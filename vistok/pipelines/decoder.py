"""From tokens to images: of a finished batch, and of the tokens so far while a generator is at work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.streams import ImageStreams
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens

PreviewCallback = Callable[[int, Any], None]  # (tokens so far, images)


class ImageDecoder:
    """A tokenizer's `decode` with its options and, where it is a sampler itself, always the same noise for an image.

    So previews and the finished image show one picture that gets finer, and neighbours in the batch change nothing.

    Args:
        tokenizer: decodes.
        streams: one per image; where noise is needed, a seed is drawn from each.
        options: for `tokenizer.decode`.

    Raises:
        ValueError: an option that this tokenizer's `decode` does not have.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, streams: ImageStreams, options: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        known = inspect.signature(tokenizer.decode).parameters
        for name in self.options:
            if name not in known or name in ("tokens", "generator"):
                raise ValueError(f"{name} is not a decoding option of a {type(tokenizer).__name__}")
        self.seeds = streams.seeds() if "generator" in known else None

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Tensor:
        """Images `[b 3 H W]` in [-1, 1]."""
        options = self.options
        if self.seeds is not None:
            options = options | {"generator": [torch.Generator().manual_seed(seed) for seed in self.seeds]}
        return self.tokenizer.decode(tokens.to(self.tokenizer.device), **options)


class Preview:
    """Shows the tokens so far as images, whenever their number is one of those asked for.

    Args:
        callback: called as `callback(num_tokens, images)`.
        decode: tokens to what the callback gets.
        lengths: `[b]`, where each image stops; one that is finished is shown as it is.
        at: numbers of tokens; 1, 2, 4, ... when `None`.

    Raises:
        ValueError: a number in `at` is below 1 or above all lengths.
    """

    def __init__(
        self,
        callback: PreviewCallback,
        decode: Callable[[Tokens], Any],
        lengths: Tensor,
        at: Sequence[int] | None = None,
    ) -> None:
        most = int(lengths.max())
        self.at = {2**i for i in range(most.bit_length())} if at is None else set(at)
        if outside := sorted(num_tokens for num_tokens in self.at if not 1 <= num_tokens <= most):
            raise ValueError(f"preview_at must lie in 1..{most}, the tokens that are drawn; got {outside}")
        self.callback = callback
        self.decode = decode
        self.lengths = lengths

    def show(self, num_tokens: int, tokens: Tokens) -> None:
        """Decode the first `num_tokens` of `tokens` if a preview is due there."""
        if num_tokens in self.at:
            self.callback(num_tokens, self.decode(tokens.keep(self.lengths.clamp(max=num_tokens))))
