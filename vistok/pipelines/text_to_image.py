"""Text -> image with a generator of any kind that reads texts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.decoding.sampling import LogitsProcessor
from vistok.models.generators.base import Condition, Generator, repeat_each
from vistok.models.generators.text_features import TextEncoder, TextFeatures, load_t5
from vistok.models.tokenizers.base import NumTokens
from vistok.pipelines.base import (
    ImagePipeline,
    ImagePipelineOutput,
    StepEnd,
    check_negative,
    check_request,
    one_per_image,
)
from vistok.pipelines.decoder import PreviewCallback
from vistok.pipelines.drawing import Conditions
from vistok.pipelines.settings import Settings
from vistok.pipelines.speculation import SpeculativeDecoding
from vistok.tokens import Tokens

Prompts = str | Sequence[str]


@dataclass(frozen=True)
class Texts:
    """What a call says about its texts.

    Args:
        prompts: the texts, or
        features: their features.
        negatives: texts that guidance leads away from, or
        null_features: their features; neither for "no text".

    Raises:
        ValueError: none of two alternatives where one is needed, both, no text, or an empty one.
    """

    prompts: list[str]
    features: TextFeatures | None
    negatives: list[str]
    null_features: TextFeatures | None

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError("no prompt given; describe what to draw, for example 'red apple'")
        if self.prompts and self.features is not None:
            raise ValueError("give either prompt or prompt_features")
        if not all(text.strip() for text in self.prompts):
            raise ValueError("the prompt is empty; describe what to draw, for example 'red apple'")
        if self.negatives and self.null_features is not None:
            raise ValueError("give negative_prompt or null_features: both say what guidance leads away from")

    @classmethod
    def of_call(
        cls,
        prompt: Prompts | None,
        prompt_features: TextFeatures | None,
        negative_prompt: Prompts | None,
        null_features: TextFeatures | None,
    ) -> Texts:
        """From the arguments of a pipeline's call; blank negative prompts are "no text"."""
        negatives = _as_list(negative_prompt)
        if not any(text.strip() for text in negatives):
            negatives = []
        return cls(_as_list(prompt), prompt_features, negatives, null_features)

    def __len__(self) -> int:
        return len(self.prompts) if self.features is None else len(self.features)

    @property
    def are_plain(self) -> bool:
        """Whether no features are given."""
        return self.features is None and self.null_features is None

    @property
    def has_null(self) -> bool:
        """Whether it is said what guidance leads away from."""
        return bool(self.negatives) or self.null_features is not None


class TextToImagePipeline(ImagePipeline):
    """Draws images from texts; see `ImagePipeline` for the arguments.

    The transformer reads texts itself, and has `encode_text(prompts) -> condition`, or it reads their features, and names
    `text_encoder` and `max_text_length` in its configuration. Where its unconditional branch is not a condition of its
    own but the features of some text, this is its `null_prompt`.

    Attributes:
        text_encoder: for a transformer that reads features; the one it was trained with is loaded from the hub when it
            is first needed.
    """

    negative_argument = "negative_prompt"
    text_encoder: TextEncoder | None = None

    def _check_condition(self, transformer: Generator) -> None:
        if not hasattr(transformer, "encode_text") and "text_encoder" not in transformer.config:
            raise ValueError(
                f"{type(transformer).__name__} is not conditioned on a text; use ClassToImagePipeline for classes"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        negative_prompt: Prompts | None = None,
        prompt_features: TextFeatures | None = None,
        null_features: TextFeatures | None = None,
        num_images_per_prompt: int = 1,
        num_tokens: NumTokens | None = None,
        tokens: Tokens | None = None,
        keep: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_tokens: int | None = None,
        choice_temperature: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        logits_processor: LogitsProcessor | None = None,
        speculation: SpeculativeDecoding | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decode_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        preview_callback: PreviewCallback | None = None,
        preview_at: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images for every prompt, prompt by prompt.

        Args:
            prompt: one or several texts.
            negative_prompt: guide away from this text instead of from no text; one for all images, or one for each.
            prompt_features: instead of `prompt`, for a transformer that reads them: the features of the texts.
            null_features: with them, what guidance leads away from, one row for all images or one for each: the features
                of a negative text, or of the `null_prompt` that some transformers need for guidance.
            num_images_per_prompt: images for each prompt.
            num_tokens, tokens, keep, ..., batch_size: see `ClassToImagePipeline.__call__`.

        Raises:
            ValueError: an empty prompt, a setting outside its range or of another kind of generator, a negative prompt
                without guidance, tokens or a mask that do not fit, or a length or previews that are not possible.
            ModuleNotFoundError, FileNotFoundError: the text encoder cannot be loaded, see `load_t5`.
        """
        check_request(output_type, num_images_per_prompt)
        settings = self._settings(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_tokens=guidance_tokens,
            choice_temperature=choice_temperature,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            typical_p=typical_p,
        )
        texts = Texts.of_call(prompt, prompt_features, negative_prompt, null_features)
        self._check_texts(texts, settings)
        is_guided = settings.guidance_scale != 1.0
        return self._generate(
            functools.partial(self._conditions, texts, num_images_per_prompt, is_guided),
            len(texts),
            settings,
            num_images_per_prompt=num_images_per_prompt,
            num_tokens=num_tokens,
            tokens=tokens,
            keep=keep,
            logits_processor=logits_processor,
            speculation=speculation,
            seed=seed,
            generator=generator,
            decode_options=decode_options,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            preview_callback=preview_callback,
            preview_at=preview_at,
            batch_size=batch_size,
        )

    def _check_texts(self, texts: Texts, settings: Settings) -> None:
        name = type(self.transformer).__name__
        if hasattr(self.transformer, "encode_text") and not texts.are_plain:
            raise ValueError(f"{name} reads texts itself: give prompt, not prompt_features")
        check_negative("negative_prompt", texts.negatives or None, settings)
        check_negative("null_features", texts.null_features, settings)
        is_null_needed = settings.guidance_scale != 1.0 and self._null_prompt is not None
        if texts.features is not None and is_null_needed and not texts.has_null:
            raise ValueError(
                f"guidance of a {name} needs the features of the text {self._null_prompt!r}, one row: pass null_features, "
                "or guidance_scale=1.0"
            )

    @property
    def _null_prompt(self) -> str | None:
        return getattr(self.transformer, "null_prompt", None)

    def _conditions(self, texts: Texts, num_images_per_prompt: int, is_guided: bool) -> Conditions:
        """One row per image, with those of the unconditional branch where the transformer does not know them."""
        condition = self._encode(texts.prompts) if texts.features is None else texts.features
        rows = repeat_each(condition, num_images_per_prompt)
        null: Condition | None = texts.null_features
        if texts.negatives:
            null = self._encode(texts.negatives)
        elif null is None and is_guided and self._null_prompt is not None:
            null = self._encode([self._null_prompt])
        return Conditions(
            rows, None if null is None else one_per_image(null, len(rows), "the negative prompt")
        )

    def _encode(self, texts: list[str]) -> Condition:
        transformer: Any = self.transformer
        if hasattr(transformer, "encode_text"):
            return transformer.encode_text(texts)
        if self.text_encoder is None:
            self.text_encoder = load_t5(
                transformer.config["text_encoder"],
                max_length=transformer.config["max_text_length"],
                clean=getattr(transformer, "clean_text", None),
                device=transformer.device,
                dtype=transformer.dtype,
            )
        with self.visit(self.text_encoder):
            return self.text_encoder(texts)


def _as_list(prompt: Prompts | None) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt or [])
