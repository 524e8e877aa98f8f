"""Class -> image with a masked generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.data.imagenet import NUM_CLASSES, class_index
from vistok.decoding.guidance import make_guidance
from vistok.decoding.masked import MaskedSamplingParams, generate_masked
from vistok.models.generators.base import MaskedGenerator
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.upstream.maskgit import sampling_settings
from vistok.models.upstream.releases import Release
from vistok.pipelines.base import ImagePipeline, ImagePipelineOutput, StepEnd, check_request

Label = int | str


class ClassToImagePipeline(ImagePipeline):
    """Draws images of classes.

    Args:
        tokenizer: decodes the tokens.
        transformer: a masked generator.
        num_inference_steps, guidance_scale, choice_temperature: the preset, used where a call does not say otherwise.
        guidance_schedule, guidance_power: see `make_guidance`.
        softmax_annealing: see `MaskedSamplingParams`.

    Raises:
        ValueError: tokenizer and transformer do not fit, or a setting is outside its range.
    """

    model_cpu_offload_seq = "transformer->tokenizer"  # type: ignore[assignment]
    transformer: MaskedGenerator

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        transformer: MaskedGenerator,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 3.0,
        choice_temperature: float = 4.5,
        softmax_annealing: bool = False,
    ) -> None:
        super().__init__()
        self._check_fit(tokenizer, transformer)
        make_guidance(guidance_schedule, guidance_scale, guidance_power)
        MaskedSamplingParams(num_inference_steps, choice_temperature, softmax_annealing)
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            choice_temperature=choice_temperature,
            softmax_annealing=softmax_annealing,
        )

    @classmethod
    def from_release(
        cls, tokenizer: ImageTokenizer, transformer: MaskedGenerator, release: Release
    ) -> ClassToImagePipeline:
        """The pipeline of a published generator, with the sampling settings of its release as the preset.

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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        choice_temperature: float | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images of every class, class by class.

        Args:
            class_labels: one or several classes, by index or, for an ImageNet generator, by name or WordNet id.
            num_images_per_prompt: images of each of them.
            num_inference_steps: steps of the generator.
            guidance_scale: classifier-free guidance, 1.0 is off; the schedule is the preset's.
            choice_temperature: see `MaskedSamplingParams`.
            seed: image j of every class uses `seed + j`; or a list with one seed per image.
            generator: instead of `seed`, one `torch.Generator` per image, or one from which they are seeded.
            output_type: `"pil"`, `"np"`, `"pt"` or `"tokens"`; see `ImagePipelineOutput`.
            return_dict: `False` returns a tuple.
            callback_on_step_end: called as `callback(pipeline, step, num_steps, {"indices": [b n]})`; undecided
                positions hold the generator's `mask_token_id`.

        Raises:
            ValueError: an unknown class, an ambiguous name, or a setting outside its range.
        """
        check_request(output_type, num_images_per_prompt)
        labels = self.class_indices(class_labels)
        settings = self.sampling_settings(num_inference_steps, guidance_scale, choice_temperature)
        sampling = MaskedSamplingParams(
            settings["num_inference_steps"], settings["choice_temperature"], settings["softmax_annealing"]
        )
        indices = generate_masked(
            self.transformer,
            labels.repeat_interleave(num_images_per_prompt),
            streams=self._streams(seed, generator, len(labels), num_images_per_prompt),
            sampling=sampling,
            guidance=make_guidance(
                settings["guidance_schedule"], settings["guidance_scale"], settings["guidance_power"]
            ),
            on_step=self._step_callback(callback_on_step_end, sampling.num_steps),
        )
        return self._output(indices, output_type, return_dict)

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

    def sampling_settings(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        choice_temperature: float | None = None,
    ) -> dict[str, Any]:
        """The settings a call with these arguments samples with: what is `None` comes from the preset."""
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "choice_temperature": choice_temperature,
        }
        fixed = ("guidance_schedule", "guidance_power", "softmax_annealing")
        preset = {name: self.config[name] for name in (*given, *fixed)}
        return preset | {name: value for name, value in given.items() if value is not None}
