"""Text -> image with a next-token generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.next_token import generate_next_token
from vistok.decoding.sampling import SamplingParams
from vistok.models.generators.text_ar import TextAR
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.base import ImagePipeline, ImagePipelineOutput, StepEnd, check_request


class TextToImagePipeline(ImagePipeline):
    """Draws images from texts.

    Args:
        tokenizer: decodes the tokens.
        transformer: a next-token generator with `encode_text`.
        guidance_scale, temperature, top_k, top_p: the preset, used where a call does not say otherwise.

    Raises:
        ValueError: tokenizer and transformer do not fit.
    """

    transformer: TextAR
    model_cpu_offload_seq = "transformer->tokenizer"  # type: ignore[assignment]

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        transformer: TextAR,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> None:
        super().__init__()
        self._check_fit(tokenizer, transformer)
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        self.register_to_config(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images for every prompt, prompt by prompt.

        Args:
            prompt: one or several texts.
            num_images_per_prompt: images for each of them.
            guidance_scale: classifier-free guidance, 1.0 is off.
            temperature, top_k, top_p: see `SamplingParams`.
            seed: image j of every prompt uses `seed + j`; or a list with one seed per image.
            generator: instead of `seed`, one `torch.Generator` per image, or one from which they are seeded.
            output_type: `"pil"`, `"np"`, `"pt"` or `"tokens"`; see `ImagePipelineOutput`.
            return_dict: `False` returns a tuple.
            callback_on_step_end: called as `callback(pipeline, step, num_steps, {"indices": [b n]})`.

        Raises:
            ValueError: an empty or too long prompt, or a setting outside its range.
        """
        check_request(output_type, num_images_per_prompt)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("no prompt given; describe what to draw, for example 'red apple'")
        settings = self.sampling_settings(guidance_scale, temperature, top_k, top_p)
        sampling = SamplingParams(
            temperature=settings["temperature"], top_k=settings["top_k"], top_p=settings["top_p"]
        )
        condition = self.transformer.encode_text(
            [text for text in prompts for _ in range(num_images_per_prompt)]
        )
        indices = generate_next_token(
            self.transformer,
            condition,
            streams=self._streams(seed, generator, len(prompts), num_images_per_prompt),
            sampling=sampling,
            guidance=ConstantGuidance(settings["guidance_scale"]),
            on_step=self._step_callback(callback_on_step_end, self.transformer.num_tokens),
        )
        return self._output(indices, output_type, return_dict)

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
