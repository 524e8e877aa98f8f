"""What all image pipelines share: the preset, streams from seeds, lengths, given tokens, previews, output types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from vistok.decoding.given import Given
from vistok.decoding.ordered import StepCallback, check_num_tokens
from vistok.decoding.sampling import LogitsProcessor
from vistok.decoding.speculative.generate import SpeculationStatistics
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import Condition, Generator, OrderedGenerator, repeat_each
from vistok.models.tokenizers.base import ImageTokenizer, NumTokens
from vistok.order import RasterOrder
from vistok.pipelines.batches import Batches
from vistok.pipelines.compilation import Compilation
from vistok.pipelines.decoder import ImageDecoder, Preview, PreviewCallback
from vistok.pipelines.drawing import Conditions, Request, check_codes, followed_order
from vistok.pipelines.fit import check_fit
from vistok.pipelines.inpainting import given_tokens
from vistok.pipelines.offload import onload
from vistok.pipelines.settings import ALL_SETTINGS, Settings, override, settings_for
from vistok.pipelines.speculation import SpeculativeDecoding, check_speculation
from vistok.tokens import Tokens

# diffusers' list of libraries that parts of a pipeline come from: model_index.json then names ours as "vistok".
LOADABLE_CLASSES["vistok"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}

DRAFTER_FOLDER = "drafter"  # in the folder of a pipeline that comes with a trained drafter
OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
StepEnd = Callable[["ImagePipeline", int, int, dict[str, Any]], object]  # what it returns is not used


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Result of a pipeline.

    Args:
        images: pictures, arrays `[b H W 3]` in [0, 1], a tensor `[b 3 H W]` in [-1, 1], or `Tokens`.
        statistics: what speculative decoding took; `None` for plain decoding.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor | Tokens
    statistics: SpeculationStatistics | None = None


class ImagePipeline(Compilation, DiffusionPipeline):
    """A tokenizer and an image model that fit each other.

    The model is called `transformer`, as in diffusers: `generator` is always a `torch.Generator`. Any generator fits any
    tokenizer with the same vocabulary, or the same channels and scale of latents, number of tokens and layout.

    The settings are the preset, used where a call does not say otherwise. Those that the kind of generator does not
    have must stay `None`; the others are, where `None`, the defaults of its kind: `OrderedSettings` of a generator with
    a fixed order, `MaskedSettings` of a masked one, `FlowSettings` of xAR, `DiffusionSettings` of MAR.

    Args:
        tokenizer: decodes the tokens.
        transformer: makes them.
        num_inference_steps: of all kinds but the first: steps of a masked generator, denoising steps within each step of
            a continuous one.
        num_steps: of MAR: steps over all tokens.
        num_final_inference_steps: of xAR and MAR: denoising steps within the last step, where they are annealed (DiSA).
        guidance_scale: of all kinds; 1.0 is off.
        guidance_tokens, top_k, top_p, typical_p: of a generator with a fixed order.
        guidance_schedule, guidance_power: of all others.
        choice_temperature, softmax_annealing: of a masked generator.
        temperature: of a generator with a fixed order, and of MAR.
        integrator: of xAR.
        last_timestep: of MAR.
        reuse_period, reuse_warm_up: of a masked generator, and of MAR.
        decode_options: for `tokenizer.decode`; and `batch_size`, see `ImageDecoder`.

    Raises:
        ValueError: tokenizer and transformer do not fit, the transformer is conditioned on something else, or a setting
            is outside its range or of another kind.
    """

    tokenizer: ImageTokenizer
    transformer: Generator
    model_cpu_offload_seq = "transformer->tokenizer"  # type: ignore[assignment]
    negative_argument: ClassVar[str]  # what a call takes to guide away from

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        transformer: Generator,
        num_inference_steps: int | None = None,
        num_steps: int | None = None,
        num_final_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_tokens: int | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        choice_temperature: float | None = None,
        softmax_annealing: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        integrator: str | None = None,
        last_timestep: int | None = None,
        reuse_period: int | None = None,
        reuse_warm_up: int | None = None,
        decode_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._check_condition(transformer)
        check_fit(tokenizer, transformer)
        given = {
            "num_inference_steps": num_inference_steps,
            "num_steps": num_steps,
            "num_final_inference_steps": num_final_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_tokens": guidance_tokens,
            "guidance_schedule": guidance_schedule,
            "guidance_power": guidance_power,
            "choice_temperature": choice_temperature,
            "softmax_annealing": softmax_annealing,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "typical_p": typical_p,
            "integrator": integrator,
            "last_timestep": last_timestep,
            "reuse_period": reuse_period,
            "reuse_warm_up": reuse_warm_up,
        }
        settings = settings_for(transformer, given)
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        self.register_to_config(**given | asdict(settings), decode_options=decode_options)

    def _check_condition(self, transformer: Generator) -> None:
        """Raises ValueError unless the transformer is conditioned on what this pipeline takes."""
        raise NotImplementedError(f"{type(self).__name__} does not define _check_condition()")

    def sampling_settings(self, **given: Any) -> dict[str, Any]:
        """The settings a call with these arguments samples with: what is `None` comes from the preset.

        Raises:
            ValueError: one that this kind of generator does not have, or a value outside its range.
        """
        return asdict(self._settings(**given))

    def _settings(self, **given: Any) -> Settings:
        preset = settings_for(self.transformer, {name: self.config[name] for name in ALL_SETTINGS})
        return override(preset, given, self.transformer)

    def _generate(
        self,
        conditions: Callable[[], Conditions],
        num_prompts: int,
        settings: Settings,
        *,
        num_images_per_prompt: int,
        num_tokens: NumTokens | None,
        tokens: Tokens | None,
        keep: Tensor | None,
        logits_processor: LogitsProcessor | None,
        speculation: SpeculativeDecoding | None,
        seed: int | Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        decode_options: Mapping[str, Any] | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: StepEnd | None,
        preview_callback: PreviewCallback | None,
        preview_at: Sequence[int] | None,
        batch_size: int | None,
    ) -> ImagePipelineOutput | tuple:
        """What a call does once it knows its settings; see `ClassToImagePipeline.__call__` for the arguments.

        Args:
            conditions: gives what the images are drawn from, called when all else was found in order.
            num_prompts: how many different conditions.
            settings: how the generator is sampled.
        """
        total = num_prompts * num_images_per_prompt
        lengths = self._lengths(num_tokens, total)
        has_given = tokens is not None or keep is not None
        check_codes(self.transformer, has_given=has_given, logits_processor=logits_processor)
        given = given_tokens(self.tokenizer, tokens, keep, total)
        check_kept(given, lengths)
        streams = self._streams(seed, generator, num_prompts, num_images_per_prompt)
        decoder = self._decoder(streams, decode_options)
        batches = Batches(lengths, batch_size)
        preview = self._preview(preview_callback, preview_at, lengths, decoder, output_type)
        if preview is not None and len(batches.parts) > 1:
            raise ValueError(
                "previews show all images of a call, and batch_size draws some after the others; leave one of the two out"
            )
        if speculation is not None:
            check_speculation(
                self.transformer,
                has_given=given is not None,
                has_processor=logits_processor is not None,
                has_preview=preview is not None,
                is_offloading=self.is_offloading,
            )
        model = followed_order(self.transformer, given)
        if speculation is None:
            model = self.compiled(model)
        drawn_from = conditions()
        onload(self.transformer)
        with self._steps(batches.num_steps(model, settings), callback_on_step_end, preview) as on_step:
            request = Request(drawn_from, streams, lengths, given, logits_processor, on_step)
            drawn, statistics = batches.draw(model, settings, request, speculation)
        output = self._output(drawn, statistics, decoder, output_type, return_dict)
        self.maybe_free_model_hooks()
        return output

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
        """One length per image, `[b]`; raises ValueError where the generator or the tokenizer needs all tokens."""
        lengths = check_num_tokens(num_tokens, total, self.transformer.num_tokens)
        if bool((lengths != self.tokenizer.num_tokens).any()):
            self._check_prefixes("num_tokens cannot be chosen")
        return lengths

    def _check_prefixes(self, consequence: str) -> None:
        """Raises ValueError, with the `consequence`, unless the first tokens of an image are a coarser image."""
        if not self.tokenizer.variable_length:
            raise ValueError(
                f"{type(self.tokenizer).__name__} decodes exactly {self.tokenizer.num_tokens} tokens, it is no "
                f"variable-length tokenizer: {consequence}"
            )
        model = self.transformer
        if isinstance(model, OrderedGenerator) and not isinstance(model.order, RasterOrder):
            raise ValueError(
                f"{type(model).__name__} does not decide the first tokens first, but in {type(model.order).__name__}: "
                f"{consequence}"
            )

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
        self._check_prefixes("there are no previews")
        if not isinstance(self.transformer, OrderedGenerator):
            raise ValueError(
                f"{type(self.transformer).__name__} decides its tokens in no fixed order: there are no previews"
            )
        kind = "pt" if output_type == "tokens" else output_type

        def decode(tokens: Tokens) -> Any:
            images = decoder(tokens, kind)
            onload(self.transformer)  # the tokenizer may have had its place
            return images

        return Preview(callback, decode, lengths, at)

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
        name = "latents" if self.tokenizer.codebook_size is None else "indices"

        def on_step(step: int, drawn: Tensor) -> None:
            progress.update(step + 1 - progress.n)
            if callback is not None:
                callback(self, step, num_steps, {name: drawn})
            if preview is not None:
                preview.show(step + 1, self._tokens(drawn))

        try:
            yield on_step
        except BaseException:
            if not progress.disable:
                progress.fp.write("\n")  # what is said about the error begins a line
            # When closed it would print itself once more, below that.
            progress.disable = True
            raise
        progress.close()

    def _tokens(self, indices: Tensor) -> Tokens:
        return Tokens(
            indices=indices, codebook_size=self.tokenizer.codebook_size, layout=self.tokenizer.layout
        )

    def _output(
        self,
        tokens: Tokens,
        statistics: SpeculationStatistics | None,
        decoder: ImageDecoder,
        output_type: str,
        return_dict: bool,
    ) -> ImagePipelineOutput | tuple:
        result: Any = tokens
        if output_type != "tokens":
            result = decoder(tokens, output_type, progress_bar=self.progress_bar)
        return ImagePipelineOutput(images=result, statistics=statistics) if return_dict else (result,)


def check_request(output_type: str, num_images_per_prompt: int) -> None:
    """Raises ValueError unless `output_type` is one of OUTPUT_TYPES and at least one image per prompt is asked for."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")


def check_kept(given: Given | None, lengths: Tensor) -> None:
    """Raises ValueError when a token stays that its image, of `lengths [b]`, does not have."""
    if given is None:
        return
    beyond = given.keep & (torch.arange(given.keep.shape[1]) >= lengths[:, None])
    if bool(beyond.any()):
        row, position = beyond.nonzero()[0].tolist()
        raise ValueError(
            f"keep marks token {position} of image {row}, of which {int(lengths[row])} are asked for; "
            "keep fewer, or raise num_tokens"
        )


def check_negative(name: str, negative: Any, settings: Settings) -> None:
    """Raises ValueError when something is given to guide away from, and guidance is off."""
    if negative is not None and settings.guidance_scale == 1.0:
        raise ValueError(f"{name} needs guidance, and guidance_scale is 1.0, which is off; try 2.0")


def one_per_image(condition: Condition, total: int, name: str) -> Condition:
    """The rows of `condition`, a single one of them for every image; raises ValueError for another number."""
    if len(condition) not in (1, total):
        raise ValueError(
            f"{len(condition)} rows of {name} for {total} images; give one, or one for each image"
        )
    return condition if len(condition) == total else repeat_each(condition, total)


def _one_each(generator: Any, total: int) -> list[torch.Generator]:
    """One generator per image, on the CPU, where all randomness is drawn."""
    if isinstance(generator, torch.Generator):
        return _seeded_from(generator, total)
    if len(generator) != total:
        raise ValueError(f"{len(generator)} generators for {total} images; give one, or one for each image")
    return [_on_cpu(one) for one in generator]


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    return generator if generator.device.type == "cpu" else _seeded_from(generator, 1)[0]


def _seeded_from(generator: torch.Generator, count: int) -> list[torch.Generator]:
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
