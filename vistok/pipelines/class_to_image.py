"""Class -> image with a masked or a next-token generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vistok.data.imagenet import NUM_CLASSES, class_index
from vistok.decoding.masked import generate_masked
from vistok.decoding.ordered import StepCallback, generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import MaskedGenerator, OrderedGenerator
from vistok.models.generators.flex_ar import FlexARClass
from vistok.models.tokenizers.base import ImageTokenizer, NumTokens
from vistok.models.upstream.maskgit import sampling_settings
from vistok.models.upstream.releases import Release
from vistok.pipelines.base import ImagePipeline, ImagePipelineOutput, StepEnd, check_request
from vistok.pipelines.decoder import PreviewCallback
from vistok.pipelines.settings import (
    ALL_SETTINGS,
    MaskedSettings,
    OrderedSettings,
    Settings,
    override,
    settings_for,
)
from vistok.tokens import Tokens

Label = int | str
ClassGenerator = MaskedGenerator | FlexARClass


class ClassToImagePipeline(ImagePipeline):
    """Draws images of classes, with a masked or with a next-token generator.

    The settings are the preset, used where a call does not say otherwise. Those that the kind of generator does not
    have must stay `None`; the others are, where `None`, those of `MaskedSettings` or `OrderedSettings`.

    Args:
        tokenizer: decodes the tokens.
        transformer: a generator with `num_classes`.
        num_inference_steps, guidance_schedule, guidance_power, choice_temperature, softmax_annealing: of a masked
            generator, see `MaskedSettings`.
        guidance_scale: of both kinds.
        temperature, top_k, top_p: of a next-token generator, see `OrderedSettings`.
        decode_options: for `tokenizer.decode`.

    Raises:
        ValueError: tokenizer and transformer do not fit, or a setting is outside its range or of the other kind.
    """

    model_cpu_offload_seq = "transformer->tokenizer"  # type: ignore[assignment]
    transformer: ClassGenerator

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        transformer: ClassGenerator,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        choice_temperature: float | None = None,
        softmax_annealing: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        decode_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._check_fit(tokenizer, transformer)
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "guidance_power": guidance_power,
            "choice_temperature": choice_temperature,
            "softmax_annealing": softmax_annealing,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        settings = settings_for(transformer, given)
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        self.register_to_config(**given | asdict(settings), decode_options=decode_options)

    @classmethod
    def from_release(
        cls, tokenizer: ImageTokenizer, transformer: MaskedGenerator, release: Release
    ) -> ClassToImagePipeline:
        """The pipeline of a published masked generator, with the sampling settings of its release as the preset.

        Raises:
            ValueError: the release is not a generator's, or as for the constructor.
        """
        if release.sampling is None:
            raise ValueError(f"release {release.name!r} has no sampling settings: it is not a generator")
        return cls(tokenizer, transformer, **sampling_settings(release.sampling))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label],
        *,
        num_images_per_prompt: int = 1,
        num_tokens: NumTokens | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        choice_temperature: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        null_class: int | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decode_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        preview_callback: PreviewCallback | None = None,
        preview_at: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images of every class, class by class.

        Args:
            class_labels: one or several classes, by index or, for an ImageNet generator, by name or WordNet id.
            num_images_per_prompt: images of each of them.
            num_tokens: keep so many tokens, one number for all images or one per image. A next-token generator stops
                there; a masked one decides all tokens in any case.
            num_inference_steps, choice_temperature: of a masked generator, see `MaskedSamplingParams`.
            guidance_scale: classifier-free guidance, 1.0 is off; the schedule is the preset's.
            temperature, top_k, top_p: of a next-token generator, see `SamplingParams`.
            null_class: of a next-token generator: from the second token on, guide away from this class instead of from
                no class. 0 gives what the published FlexAR code draws, which overwrites its own label.
            seed: image j of every class uses `seed + j`; or a list with one seed per image.
            generator: instead of `seed`, one `torch.Generator` per image, or one from which they are seeded.
            decode_options: for `tokenizer.decode`, on top of the preset's.
            output_type: `"pil"`, `"np"`, `"pt"` or `"tokens"`; see `ImagePipelineOutput`.
            return_dict: `False` returns a tuple.
            callback_on_step_end: called as `callback(pipeline, step, num_steps, {"indices": [b n]})`; undecided
                positions hold a masked generator's `mask_token_id`.
            preview_callback, preview_at: as for `TextToImagePipeline`; of a next-token generator.

        Raises:
            ValueError: an unknown class, an ambiguous name, a setting outside its range or of the other kind of
                generator, or a length or previews with a tokenizer of fixed length.
        """
        check_request(output_type, num_images_per_prompt)
        settings = self._settings(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            choice_temperature=choice_temperature,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        classes = self.class_indices(class_labels)
        labels = classes.repeat_interleave(num_images_per_prompt)
        lengths = self._lengths(num_tokens, len(labels))
        streams = self._streams(seed, generator, len(classes), num_images_per_prompt)
        decoder = self._decoder(streams, decode_options)
        preview = self._preview(preview_callback, preview_at, lengths, decoder, output_type)
        null = self._later_null(null_class, len(labels))
        num_steps = (
            settings.num_inference_steps if isinstance(settings, MaskedSettings) else int(lengths.max())
        )
        with self._steps(num_steps, callback_on_step_end, preview) as on_step:
            if isinstance(settings, MaskedSettings):
                tokens = self._decide_masked(labels, settings, streams, on_step).keep(lengths)
            else:
                tokens = self._draw_next(labels, settings, streams, lengths, null, on_step)
        return self._output(tokens, decoder, output_type, return_dict)

    def _decide_masked(
        self, labels: Tensor, settings: MaskedSettings, streams: ImageStreams, on_step: StepCallback
    ) -> Tokens:
        assert isinstance(self.transformer, MaskedGenerator)
        indices = generate_masked(
            self.transformer,
            labels,
            streams=streams,
            sampling=settings.sampling,
            guidance=settings.guidance,
            on_step=on_step,
        )
        return self._tokens(indices)

    def _draw_next(
        self,
        labels: Tensor,
        settings: OrderedSettings,
        streams: ImageStreams,
        lengths: Tensor,
        later_null: Tensor | None,
        on_step: StepCallback,
    ) -> Tokens:
        assert isinstance(self.transformer, OrderedGenerator)
        return generate_ordered(
            self.transformer,
            labels,
            streams=streams,
            num_tokens=lengths,
            sampling=settings.sampling,
            guidance=settings.guidance,
            later_null_condition=later_null,
            on_step=on_step,
        )

    def _later_null(self, null_class: int | None, batch_size: int) -> Tensor | None:
        if null_class is None:
            return None
        if not isinstance(self.transformer, OrderedGenerator):
            raise ValueError(f"null_class is not a setting of a {type(self.transformer).__name__}")
        return torch.full((batch_size,), self._class_index(null_class))

    def class_indices(self, class_labels: Label | Sequence[Label]) -> Tensor:
        """`[b]` int64 of one or several classes.

        Raises:
            ValueError: no class given, an index out of range, a name that is unknown, ambiguous or not of ImageNet.
        """
        is_single = isinstance(class_labels, int | str)
        labels: list[Any] = [class_labels] if is_single else list(class_labels)  # type: ignore[arg-type]
        if not labels:
            raise ValueError("no class given; name at least one, by index or name")
        return torch.tensor([self._class_index(label) for label in labels])

    def _class_index(self, label: Label) -> int:
        num_classes = self.transformer.num_classes
        if isinstance(label, str) and not label.strip().isdecimal():
            if num_classes != NUM_CLASSES:
                raise ValueError(
                    f"class names are those of ImageNet, and this generator has {num_classes} classes of its own; "
                    f"give an index from 0 to {num_classes - 1} instead of {label!r}"
                )
            return class_index(label)
        index = int(label)
        if not 0 <= index < num_classes:
            raise ValueError(f"class {index} is out of range: this generator knows 0 to {num_classes - 1}")
        return index

    def sampling_settings(self, **given: Any) -> dict[str, Any]:
        """The settings a call with these arguments samples with: what is `None` comes from the preset.

        Raises:
            ValueError: one that this kind of generator does not have, or a value outside its range.
        """
        return asdict(self._settings(**given))

    def _settings(self, **given: Any) -> Settings:
        preset = settings_for(self.transformer, {name: self.config[name] for name in ALL_SETTINGS})
        return override(preset, given, type(self.transformer).__name__)
