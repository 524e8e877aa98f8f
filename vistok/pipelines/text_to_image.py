"""Text -> image with a next-token generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from vistok.decoding.ordered import generate_ordered
from vistok.models.generators.base import Condition, repeat_each
from vistok.models.generators.flex_ar import FlexARText
from vistok.models.generators.text_ar import TextAR
from vistok.models.generators.text_features import TextEncoder, TextFeatures, load_t5
from vistok.models.tokenizers.base import ImageTokenizer, NumTokens
from vistok.pipelines.base import ImagePipeline, ImagePipelineOutput, StepEnd, check_request
from vistok.pipelines.decoder import PreviewCallback
from vistok.pipelines.settings import OrderedSettings


class TextToImagePipeline(ImagePipeline):
    """Draws images from texts.

    Args:
        tokenizer: decodes the tokens.
        transformer: a next-token generator that reads texts itself (`TextAR`) or through an encoder (`FlexARText`).
        guidance_scale, temperature, top_k, top_p: the preset, used where a call does not say otherwise.
        decode_options: likewise, for `tokenizer.decode`.

    Attributes:
        text_encoder: for a `FlexARText`; the one it was trained with is loaded from the hub when it is first needed.

    Raises:
        ValueError: tokenizer and transformer do not fit, or a setting is outside its range.
    """

    transformer: TextAR | FlexARText
    model_cpu_offload_seq = "transformer->tokenizer"  # type: ignore[assignment]

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        transformer: TextAR | FlexARText,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        decode_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._check_fit(tokenizer, transformer)
        settings = OrderedSettings(guidance_scale, temperature, top_k, top_p)
        self.text_encoder: TextEncoder | None = None
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        self.register_to_config(**asdict(settings), decode_options=decode_options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_features: TextFeatures | None = None,
        null_features: TextFeatures | None = None,
        num_images_per_prompt: int = 1,
        num_tokens: NumTokens | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decode_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        preview_callback: PreviewCallback | None = None,
        preview_at: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images for every prompt, prompt by prompt.

        Args:
            prompt: one or several texts.
            prompt_features: instead of `prompt`, for a `FlexARText`: the features of the texts.
            null_features: with them, those of the empty text, one row; needed with guidance.
            num_images_per_prompt: images for each of them.
            num_tokens: stop after so many tokens, one number for all images or one per image.
            guidance_scale: classifier-free guidance, 1.0 is off.
            temperature, top_k, top_p: see `SamplingParams`.
            seed: image j of every prompt uses `seed + j`; or a list with one seed per image.
            generator: instead of `seed`, one `torch.Generator` per image, or one from which they are seeded.
            decode_options: for `tokenizer.decode`, on top of the preset's.
            output_type: `"pil"`, `"np"`, `"pt"` or `"tokens"`; see `ImagePipelineOutput`.
            return_dict: `False` returns a tuple.
            callback_on_step_end: called as `callback(pipeline, step, num_steps, {"indices": [b n]})`.
            preview_callback: called as `callback(num_tokens, images)` with the images decoded from the tokens so far,
                coarse to fine, as `output_type` says (a tensor where that is `"tokens"`).
            preview_at: after how many tokens; 1, 2, 4, 8, ... by default.

        Raises:
            ValueError: an empty or too long prompt, a setting outside its range, or a length or previews with a
                tokenizer of fixed length.
            ModuleNotFoundError, FileNotFoundError: the text encoder cannot be loaded, see `load_t5`.
        """
        check_request(output_type, num_images_per_prompt)
        settings = OrderedSettings(**self.sampling_settings(guidance_scale, temperature, top_k, top_p))
        num_prompts = _num_prompts(prompt, prompt_features)
        total = num_prompts * num_images_per_prompt
        lengths = self._lengths(num_tokens, total)
        streams = self._streams(seed, generator, num_prompts, num_images_per_prompt)
        decoder = self._decoder(streams, decode_options)
        preview = self._preview(preview_callback, preview_at, lengths, decoder, output_type)
        condition, null = self._conditions(prompt, prompt_features, null_features, settings.guidance_scale)
        with self._steps(int(lengths.max()), callback_on_step_end, preview) as on_step:
            tokens = generate_ordered(
                self.transformer,
                repeat_each(condition, num_images_per_prompt),
                streams=streams,
                num_tokens=lengths,
                sampling=settings.sampling,
                guidance=settings.guidance,
                null_condition=None if null is None else null.repeat_each(total),
                on_step=on_step,
            )
        return self._output(tokens, decoder, output_type, return_dict)

    def sampling_settings(
        self,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> dict[str, Any]:
        """The settings a call with these arguments samples with: what is `None` comes from the preset."""
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return {name: self.config[name] if value is None else value for name, value in given.items()}

    def _conditions(
        self,
        prompt: str | Sequence[str] | None,
        prompt_features: TextFeatures | None,
        null_features: TextFeatures | None,
        guidance_scale: float,
    ) -> tuple[Condition, TextFeatures | None]:
        """One condition per prompt, and that of the unconditional branch where the transformer does not know it."""
        if isinstance(self.transformer, TextAR):
            if prompt_features is not None or null_features is not None:
                raise ValueError("TextAR reads texts itself: give prompt, not prompt_features")
            return self.transformer.encode_text(_as_list(prompt)), None
        if prompt_features is None:
            return self._encode(_as_list(prompt), guidance_scale)
        if guidance_scale != 1.0 and (null_features is None or len(null_features) != 1):
            raise ValueError(
                "guidance needs the features of the empty text, one row: pass null_features, or guidance_scale=1.0"
            )
        return prompt_features, null_features

    def _encode(self, prompts: list[str], guidance_scale: float) -> tuple[TextFeatures, TextFeatures | None]:
        assert isinstance(self.transformer, FlexARText)
        if not all(text.strip() for text in prompts):
            raise ValueError("the prompt is empty; describe what to draw, for example 'red apple'")
        if self.text_encoder is None:
            config = self.transformer.config
            self.text_encoder = load_t5(
                config["text_encoder"],
                max_length=config["max_text_length"],
                device=self.transformer.device,
                dtype=self.transformer.dtype,
            )
        return self.text_encoder(prompts), self.text_encoder([""]) if guidance_scale != 1.0 else None


def _num_prompts(prompt: str | Sequence[str] | None, prompt_features: TextFeatures | None) -> int:
    if (prompt is None) == (prompt_features is None):
        raise ValueError("give either prompt or prompt_features")
    count = len(_as_list(prompt)) if prompt_features is None else len(prompt_features)
    if count == 0:
        raise ValueError("no prompt given; describe what to draw, for example 'red apple'")
    return count


def _as_list(prompt: str | Sequence[str] | None) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt or [])
