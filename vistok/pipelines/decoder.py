"""From tokens to images: of a finished batch, and of the tokens so far while a generator is at work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.images import to_pil
from vistok.decoding.streams import ImageStreams
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.offload import onload
from vistok.tokens import Tokens

PreviewCallback = Callable[[int, Any], None]  # (tokens so far, images)


PIXELS_AT_ONCE = 8 * 256**2  # a convolutional decoder needs some hundred floats for each at its peak
PER_IMAGE = ("noise",)  # decoding options with one row for each image
ProgressBar = Callable[..., Any]  # of a pipeline: total -> a bar with `update` and `close`


class ImageDecoder:
    """A tokenizer's `decode` with its options and, where it is a sampler itself, always the same noise for an image.

    So previews and the finished image show one picture that gets finer, and neighbours in the batch change nothing.
    Any number of images is decoded in the memory of a few.

    Args:
        tokenizer: decodes.
        streams: one per image; where noise is needed, a seed is drawn from each.
        options: for `tokenizer.decode`; and `batch_size`, how many images are decoded at a time, by default as many as
            have `PIXELS_AT_ONCE` pixels.

    Raises:
        ValueError: an option that this tokenizer's `decode` does not have, or a `batch_size` below 1.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, streams: ImageStreams, options: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        self.batch_size = self.options.pop("batch_size", images_at_once(tokenizer.image_size))
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"the batch_size of decoding must be at least 1 image, got {self.batch_size}")
        known = inspect.signature(tokenizer.decode).parameters
        for name in self.options:
            if name not in known or name in ("tokens", "generator"):
                raise ValueError(f"{name} is not a decoding option of a {type(tokenizer).__name__}")
        self.seeds = streams.seeds() if "generator" in known else None

    def __call__(
        self, tokens: Tokens, output_type: str = "pt", *, progress_bar: ProgressBar | None = None
    ) -> Any:
        """Images of all tokens.

        Args:
            tokens: of one image for every stream.
            output_type: `"pt"` for `[b 3 H W]` in [-1, 1] on the tokenizer's device; `"np"` and `"pil"`, see
                `ImagePipelineOutput`, leave no more there than the images of one batch.
            progress_bar: shown when there are several batches.
        """
        onload(self.tokenizer)
        starts = range(0, max(1, len(tokens)), self.batch_size)
        progress = progress_bar(total=len(starts)) if progress_bar and len(starts) > 1 else None
        batches = []
        for start in starts:
            images = self._decode(tokens, slice(start, start + self.batch_size))
            batches.append(convert(images, output_type))
            if progress is not None:
                progress.update()
        if progress is not None:
            progress.close()
        return _joined(batches)

    @torch.no_grad()
    def _decode(self, tokens: Tokens, part: slice) -> Tensor:
        options = {name: value[part] if name in PER_IMAGE else value for name, value in self.options.items()}
        if self.seeds is not None:
            options["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds[part]]
        return self.tokenizer.decode(tokens[part].to(self.tokenizer.device), **options)


def images_at_once(image_size: int) -> int:
    """How many images of a size are decoded together unless something else is said."""
    return max(1, PIXELS_AT_ONCE // image_size**2)


def convert(images: Tensor, output_type: str) -> Any:
    """Images `[b 3 H W]` in [-1, 1] as a pipeline gives them: `"pt"`, `"np"` or `"pil"`."""
    if output_type == "pt":
        return images
    if output_type == "np":
        return ((images.float() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    return to_pil(images)


def _joined(batches: list[Any]) -> Any:
    """Batches of one kind as one."""
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    if isinstance(batches[0], np.ndarray):
        return np.concatenate(batches)
    return [picture for batch in batches for picture in batch]


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
