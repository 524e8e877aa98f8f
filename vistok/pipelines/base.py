"""What all image pipelines share: streams from seeds, lengths, previews, output types, the fit of the parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from vistok.data.images import to_pil
from vistok.decoding.ordered import StepCallback, check_num_tokens
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Generator, OrderedGenerator
from vistok.models.tokenizers.base import ImageTokenizer, NumTokens
from vistok.pipelines.decoder import ImageDecoder, Preview, PreviewCallback
from vistok.tokens import Tokens

# diffusers' list of libraries that parts of a pipeline come from: model_index.json then names ours as "vistok".
LOADABLE_CLASSES["vistok"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
StepEnd = Callable[["ImagePipeline", int, int, dict[str, Any]], dict[str, Any]]


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Result of a pipeline: pictures, arrays `[b H W 3]` in [0, 1], a tensor `[b 3 H W]` in [-1, 1], or `Tokens`."""

    images: list[PIL.Image.Image] | np.ndarray | Tensor | Tokens


class ImagePipeline(DiffusionPipeline):
    """A tokenizer and an image model that fit each other.

    The model is called `transformer`, as in diffusers: `generator` is always a `torch.Generator`.
    """

    tokenizer: ImageTokenizer
    transformer: Generator

    def sampling_settings(self) -> dict[str, Any]:
        """The settings that a call samples with when it names none."""
        raise NotImplementedError(f"{type(self).__name__} does not define sampling_settings()")

    def _check_fit(self, tokenizer: ImageTokenizer, transformer: Generator) -> None:
        """Raises ValueError when the transformer's tokens are not the tokenizer's."""
        for name in ("codebook_size", "num_tokens", "layout"):
            left, right = getattr(tokenizer, name), getattr(transformer, name)
            if left != right:
                raise ValueError(
                    f"{type(transformer).__name__} does not fit {type(tokenizer).__name__}: "
                    f"{name} is {right} there and {left} here"
                )

    def _streams(
        self, seed: int | Sequence[int], generator: Any, num_prompts: int, per_prompt: int
    ) -> ImageStreams:
        """One stream per image: image j of every prompt uses `seed + j`, or the given seeds or generators in order."""
        total = num_prompts * per_prompt
        if generator is not None:
            return ImageStreams(_one_each(generator, total))
        if isinstance(seed, int):
            return ImageStreams.from_seeds([seed + j for j in range(per_prompt)] * num_prompts)
        if len(seed) != total:
            raise ValueError(f"{len(seed)} seeds for {total} images; give one seed, or one for each image")
        return ImageStreams.from_seeds(seed)

    def _lengths(self, num_tokens: NumTokens | None, total: int) -> Tensor:
        """One length per image, `[b]`; raises ValueError for a length that the tokenizer does not decode."""
        lengths = check_num_tokens(num_tokens, total, self.transformer.num_tokens)
        if not self.tokenizer.variable_length and bool((lengths != self.tokenizer.num_tokens).any()):
            raise ValueError(
                f"{type(self.tokenizer).__name__} decodes exactly {self.tokenizer.num_tokens} tokens: "
                "num_tokens can be chosen only with a variable-length tokenizer"
            )
        return lengths

    def _preview(
        self,
        callback: PreviewCallback | None,
        at: Sequence[int] | None,
        lengths: Tensor,
        decoder: ImageDecoder,
        output_type: str,
    ) -> Preview | None:
        """What shows the tokens so far; raises ValueError where there is nothing to show before the end."""
        if callback is None:
            return None
        if not isinstance(self.transformer, OrderedGenerator):
            raise ValueError(
                f"{type(self.transformer).__name__} decides its tokens in no fixed order: there are no previews"
            )
        if not self.tokenizer.variable_length:
            raise ValueError(
                f"{type(self.tokenizer).__name__} decodes only all tokens of an image: there are no previews"
            )
        kind = "pt" if output_type == "tokens" else output_type
        return Preview(callback, lambda tokens: _convert(decoder(tokens), kind), lengths, at)

    def _decoder(self, streams: ImageStreams, options: Mapping[str, Any] | None) -> ImageDecoder:
        """The tokenizer with the preset's decoding options, and those of the call on top of them."""
        return ImageDecoder(
            self.tokenizer, streams, {**(self.config["decode_options"] or {}), **(options or {})}
        )

    @contextlib.contextmanager
    def _steps(
        self, num_steps: int, callback: StepEnd | None, preview: Preview | None = None
    ) -> Iterator[StepCallback]:
        """A hook for the decoding loops: progress, the user's `callback_on_step_end`, previews."""
        progress = self.progress_bar(total=num_steps)

        def on_step(step: int, indices: Tensor) -> None:
            progress.update()
            if callback is not None:
                callback(self, step, num_steps, {"indices": indices})
            if preview is not None:
                preview.show(step + 1, self._tokens(indices))

        try:
            yield on_step
        except BaseException:
            # When closed it would print itself once more, below what is said about the error.
            progress.disable = True
            raise
        progress.close()

    def _tokens(self, indices: Tensor) -> Tokens:
        return Tokens(
            indices=indices, codebook_size=self.tokenizer.codebook_size, layout=self.tokenizer.layout
        )

    def _output(
        self, tokens: Tokens, decoder: ImageDecoder, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        result: Any = tokens if output_type == "tokens" else _convert(decoder(tokens), output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def check_request(output_type: str, num_images_per_prompt: int) -> None:
    """Raises ValueError unless `output_type` is one of OUTPUT_TYPES and at least one image per prompt is asked for."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")


def _one_each(generator: Any, total: int) -> list[torch.Generator]:
    if isinstance(generator, torch.Generator):
        if total == 1:
            return [generator]
        seeds = torch.randint(2**63 - 1, (total,), generator=generator, device=generator.device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != total:
        raise ValueError(f"{len(generator)} generators for {total} images; give one, or one for each image")
    return list(generator)


def _convert(images: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images
    if output_type == "np":
        return ((images.float() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    return to_pil(images)
