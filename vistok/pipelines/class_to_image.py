"""Class -> image with a generator of any kind."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.imagenet import NUM_CLASSES, class_index
from vistok.decoding.sampling import LogitsProcessor
from vistok.models.generators.base import Generator, OrderedGenerator
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
from vistok.pipelines.speculation import SpeculativeDecoding
from vistok.tokens import Tokens

Label = int | str


class ClassToImagePipeline(ImagePipeline):
    """Draws images of classes, with any generator that has `num_classes`; see `ImagePipeline` for the arguments."""

    negative_argument = "negative_class"

    def _check_condition(self, transformer: Generator) -> None:
        if getattr(transformer, "num_classes", None) is None:
            raise ValueError(
                f"{type(transformer).__name__} is not conditioned on a class; use TextToImagePipeline for texts"
            )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label],
        *,
        negative_class: Label | Sequence[Label] | None = None,
        null_class: int | None = None,
        num_images_per_prompt: int = 1,
        num_tokens: NumTokens | None = None,
        tokens: Tokens | None = None,
        keep: Tensor | None = None,
        num_inference_steps: int | None = None,
        num_steps: int | None = None,
        num_final_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_tokens: int | None = None,
        choice_temperature: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        integrator: str | None = None,
        reuse_period: int | None = None,
        reuse_warm_up: int | None = None,
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
        """Generate `num_images_per_prompt` images of every class, class by class.

        Some tokens of a picture can stay while the others are drawn; here the upper half of a picture on a grid:

            tokens = pipeline.tokenizer.encode(images)  # images [1 3 H W] in [-1, 1]
            keep = torch.zeros(16, 16, dtype=torch.bool)
            keep[:8] = True
            pipeline(207, tokens=tokens, keep=keep)

        A masked generator sees all tokens that stay. So does one that was trained on random orders; there `keep` must be
        the same for all images of a call. Any other sees only those that its order decides before the token it draws: in
        raster order what is above or to the left, on diagonals what is nearer to the upper left corner.

        Args:
            class_labels: one or several classes, by index or, for an ImageNet generator, by name or WordNet id.
            negative_class: guide away from this class instead of from no class; one for all images, or one for each.
            null_class: of a generator with a fixed order: likewise, but only from the second step on. 0 gives what the
                published FlexAR code draws, which overwrites its own label.
            num_images_per_prompt: images of each class.
            num_tokens: keep so many tokens, one number for all images or one per image; with a variable-length
                tokenizer. A next-token generator stops there; a masked one decides all tokens in any case.
            tokens: of a picture that is changed or continued, for all images or one for each image; with a generator of
                codes, as `keep` and `logits_processor`.
            keep: with them, boolean, `True` where a token stays: `[n]`, on a grid also `[h w]`, or one row per image
                `[b n]`.
            num_inference_steps: of a masked generator, see `MaskedSamplingParams`; of a continuous one (xAR, MAR) the
                denoising steps within each of its steps.
            num_steps: of MAR: steps over all tokens, each of which decides some.
            num_final_inference_steps: of xAR and MAR: denoising steps within the last step, and linearly fewer from one
                to the next until then (DiSA).
            guidance_scale: classifier-free guidance, 1.0 is off; the schedule is the preset's.
            guidance_tokens, top_k, top_p, typical_p: of a generator with a fixed order, see `OrderedSettings`.
            choice_temperature: of a masked generator, see `MaskedSamplingParams`.
            temperature: of a generator with a fixed order, see `OrderedSettings`, and of MAR, see `DiffusionSettings`.
            integrator: of xAR, see `FlowSettings`.
            reuse_period, reuse_warm_up: of a masked generator, and of MAR: one step in so many evaluates everything, the
                others reuse features (`ContextReuse`).
            logits_processor: changes the guided logits `[b k codebook_size]` of every step before tokens are drawn.
            speculation: of a next-token generator: draft tokens and keep some, with fewer passes of the model. Seeds give
                other images than without, of the same distribution if the rule is lossless.
            seed: image j of every class uses `seed + j`; or a list with one seed per image. An image is the same
                whatever else is in the batch.
            generator: instead of `seed`, one `torch.Generator` per image, or one from which they are seeded.
            decode_options: for `tokenizer.decode`, on top of the preset's; and `batch_size`, how many images are decoded
                at a time, by default as many as fit into a few GB.
            output_type: `"pil"`, `"np"`, `"pt"` or `"tokens"`; see `ImagePipelineOutput`.
            return_dict: `False` returns a tuple.
            callback_on_step_end: called as `callback(pipeline, step, num_steps, {"indices": [b n]})`; undecided
                positions hold a masked generator's `mask_token_id`. A continuous one gives `{"latents": [b n c]}`, not
                scaled and 0 where undecided.
            preview_callback: of a next-token generator with a variable-length tokenizer: called as
                `callback(num_tokens, images)` with the images decoded from the tokens so far, coarse to fine, as
                `output_type` says (a tensor where that is `"tokens"`).
            preview_at: after how many tokens; 1, 2, 4, 8, ... by default.
            batch_size: draw so many images at a time, for calls of more than fit into memory; all together by default.
                The images are the same. `callback_on_step_end` sees one batch after another, its steps counted on.

        Raises:
            ValueError: an unknown class, an ambiguous name, a setting outside its range or of another kind of
                generator, a negative class without guidance, tokens or a mask that do not fit, or a length or previews
                that are not possible.
        """
        check_request(output_type, num_images_per_prompt)
        settings = self._settings(
            num_inference_steps=num_inference_steps,
            num_steps=num_steps,
            num_final_inference_steps=num_final_inference_steps,
            guidance_scale=guidance_scale,
            guidance_tokens=guidance_tokens,
            choice_temperature=choice_temperature,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            typical_p=typical_p,
            integrator=integrator,
            reuse_period=reuse_period,
            reuse_warm_up=reuse_warm_up,
        )
        classes = self.class_indices(class_labels)
        labels = classes.repeat_interleave(num_images_per_prompt)
        check_negative("negative_class", negative_class, settings)
        check_negative("null_class", null_class, settings)
        return self._generate(
            functools.partial(self._conditions, labels, negative_class, null_class),
            len(classes),
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

    def _conditions(
        self, labels: Tensor, negative_class: Label | Sequence[Label] | None, null_class: int | None
    ) -> Conditions:
        null = later_null = None
        if negative_class is not None:
            null = one_per_image(self.class_indices(negative_class), len(labels), "negative_class")
        if null_class is not None:
            if not isinstance(self.transformer, OrderedGenerator):
                raise ValueError(f"null_class is not a setting of a {type(self.transformer).__name__}")
            if negative_class is not None:
                raise ValueError("give negative_class or null_class: both say what guidance leads away from")
            later_null = torch.full((len(labels),), self._class_index(null_class))
        return Conditions(labels, null, later_null)

    def class_indices(self, class_labels: Label | Sequence[Label]) -> Tensor:
        """`[b]` int64 of one or several classes.

        Raises:
            ValueError: no class given, an index out of range, a name that is unknown, ambiguous or not of ImageNet.
        """
        is_single = isinstance(class_labels, int | str | np.integer)
        labels: list[Any] = [class_labels] if is_single else list(class_labels)  # type: ignore[arg-type]
        if not labels:
            raise ValueError("no class given; name at least one, by index or name")
        return torch.tensor([self._class_index(label) for label in labels])

    def _class_index(self, label: Label) -> int:
        num_classes: int = self.transformer.num_classes
        if isinstance(label, str) and not label.strip().removeprefix("-").isdecimal():
            if num_classes != NUM_CLASSES:
                raise ValueError(
                    f"class names are those of ImageNet, and this generator has {num_classes} classes of its own; "
                    f"give an index from 0 to {num_classes - 1} instead of {label!r}"
                )
            return class_index(label)
        index = int(label) if isinstance(label, str) else operator.index(label)
        if not 0 <= index < num_classes:
            raise ValueError(f"class {index} is out of range: this generator knows 0 to {num_classes - 1}")
        return index
