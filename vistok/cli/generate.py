"""`vistok generate`: images from texts or classes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.detect import make_watermark
from vistok.cli.keep import kept_tokens
from vistok.cli.options import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    Model,
    Output,
    Quantization,
    Seed,
    choose_device,
    choose_dtype,
)
from vistok.cli.output import PictureOutput, check_folder, report
from vistok.cli.speculation import choose_speculation, describe

if TYPE_CHECKING:
    from PIL.Image import Image

    from vistok.pipelines.base import ImagePipeline
    from vistok.pipelines.decoder import PreviewCallback

COLUMNS, MOST_COLUMNS = 6, 8


def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(help="What to draw: texts; for a class-conditional model class names or indices."),
    ],
    output: Output,
    model: Model = DEFAULT_MODEL,
    num_images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many tokens: fewer are coarser. [default: all]")
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for pictures of the tokens so far: 1, 2, 4, 8, ..."),
    ] = None,
    seed: Seed = 0,
    negative: Annotated[
        str | None, typer.Option(help="Guide away from this text or class instead of from nothing.")
    ] = None,
    keep_from: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="Keep a part of this picture and draw the rest."),
    ] = None,
    keep_region: Annotated[
        str | None,
        typer.Option(
            metavar="REGION",
            help="That part: top, bottom, left, right, or LEFT,TOP,RIGHT,BOTTOM between 0 and 1; for tokens on a grid.",
        ),
    ] = None,
    keep_tokens: Annotated[
        int | None, typer.Option(min=1, help="That part: the first so many tokens; for tokens in a sequence.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is off. [default: the model's]")
    ] = None,
    guidance_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Guide only until more than so many tokens are drawn. [default: the model's]"
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0. [default: the model's]")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k likeliest tokens. [default: the model's]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep this much probability, in (0, 1]. [default: the model's]")
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option(help="Keep the most typical tokens, in (0, 1]. [default: the model's]")
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a masked generator. [default: the model's]")
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Denoising steps of a continuous generator in each step. [default: the model's]"
        ),
    ] = None,
    num_final_inference_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Anneal them: so many in the last step. [default: the model's]"),
    ] = None,
    choice_temperature: Annotated[
        float | None, typer.Option(help="Noise of a masked generator; 0 is greedy. [default: the model's]")
    ] = None,
    watermark: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Mark the images with a secret text; see docs/generators.md for how well `vistok detect` finds it.",
        ),
    ] = None,
    watermark_strength: Annotated[
        float | None,
        typer.Option(min=0, help="More is easier to find and changes the images more. [default: 2]"),
    ] = None,
    decoding: Annotated[
        str,
        typer.Option(
            help="plain, speculative (a drafter proposes, the model keeps what it agrees with), or auto: with the "
            "model's own drafter where that is faster here, which is measured once."
        ),
    ] = "auto",
    drafter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Trained drafter, small generator, jacobi, neighbours or recycling. [default: the model's own]",
        ),
    ] = None,
    accept: Annotated[
        str, typer.Option(help="strict keeps the model's distribution; lantern keeps more and does not.")
    ] = "strict",
    lantern_k: Annotated[
        int | None, typer.Option(help="Codes that stand in for a drafted one. [default: 100]")
    ] = None,
    lantern_delta: Annotated[
        float | None,
        typer.Option(help="At most so much of their probability; above 1 a factor. [default: 0.1]"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw with plain decoding, and report its time.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile plain decoding: the first image takes longer, each of many less."
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Draw so many images at a time. [default: all at once]")
    ] = None,
    quantization: Quantization = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Draw images: one picture, a labelled grid, or a folder of pictures."""
    target = PictureOutput.parse(output)
    if preview is not None:
        check_folder(preview if preview.is_dir() else preview.parent)
    from vistok.hub import load_pipeline

    started = time.perf_counter()
    pipeline: Any = load_pipeline(
        model, device=choose_device(device), dtype=choose_dtype(dtype), quantization=quantization
    )
    if compiled:
        if compare:
            raise ValueError(
                "--compare times plain decoding as it is without --compile; leave one of the two out"
            )
        if decoding == "speculative":
            raise ValueError(
                "--compile is for plain decoding; leave out --decoding speculative, or --compile"
            )
        pipeline.compile()
    sampling = sampling_settings(
        pipeline,
        guidance_scale=guidance_scale,
        guidance_tokens=guidance_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        num_steps=num_steps,
        num_inference_steps=num_inference_steps,
        num_final_inference_steps=num_final_inference_steps,
        choice_temperature=choice_temperature,
    )
    seeds = [seed + j for j in range(num_images)] * len(prompts)
    mark = make_watermark(watermark, watermark_strength, pipeline.tokenizer.codebook_size, seeds)
    kept = kept_tokens(pipeline.tokenizer, keep_from, keep_region, keep_tokens)
    labels = [prompt for prompt in prompts for _ in range(num_images)]
    draw = partial(
        pipeline,
        prompts,
        num_images_per_prompt=num_images,
        num_tokens=num_tokens,
        seed=seed,
        preview_callback=None if preview is None else previews_in(preview, labels, _columns(num_images)),
        logits_processor=mark,
        batch_size=batch_size,
        **{pipeline.negative_argument: negative},
        **kept,
        **sampling,
    )
    needs_plain = preview is not None or mark is not None or bool(kept) or compiled
    speculation = choose_speculation(
        pipeline,
        decoding,
        drafter,
        accept,
        lantern_k,
        lantern_delta,
        needs_plain=needs_plain,
    )
    if compare:
        draw(speculation=None)  # what the first call of a process costs counts for neither
    loaded = time.perf_counter()
    result = draw(speculation=speculation)
    seconds = time.perf_counter() - loaded
    plain_seconds = _plain_seconds(draw) if compare else None
    pictures = result.images
    target.save(pictures, labels, _columns(num_images))
    report(
        "generate",
        model=model,
        prompts=prompts,
        num_images=len(pictures),
        num_tokens=(drawn := num_tokens or pipeline.transformer.num_tokens),
        seed=seed,
        negative=negative,
        kept=None if keep_from is None else {"picture": str(keep_from), "tokens": int(kept["keep"].sum())},
        sampling=pipeline.sampling_settings(**sampling),
        watermark_strength=None if mark is None else mark.strength,
        decoding="plain" if speculation is None else "speculative",
        speculation=describe(speculation, result.statistics),
        compiled=compiled,
        device=str(pipeline.device),
        dtype=dtype,
        quantization=quantization,
        load_seconds=round(loaded - started, 3),
        seconds=round(seconds, 3),
        plain_seconds=plain_seconds,
        tokens_per_second=round(len(pictures) * drawn / seconds, 1),
        output=output,
        preview=None if preview is None else str(preview),
    )


def _plain_seconds(draw: Callable[..., Any]) -> float:
    """How long the same call takes with plain decoding."""
    started = time.perf_counter()
    draw(speculation=None)
    return round(time.perf_counter() - started, 3)


def previews_in(folder: Path, labels: list[str], columns: int) -> PreviewCallback:
    """A callback that saves what is drawn so far as `tokens-001.png`, `tokens-002.png`, ... in `folder`."""

    def save(num_tokens: int, pictures: list[Image]) -> None:
        folder.mkdir(exist_ok=True)
        target = PictureOutput(folder / f"tokens-{num_tokens:03d}.png", is_folder=False)
        target.save(pictures, labels, columns)

    return save


def sampling_settings(pipeline: ImagePipeline, **given: Any) -> dict[str, Any]:
    """Those settings that are not `None`; a masked generator of codes calls `num_steps` its `num_inference_steps`.

    Raises:
        ValueError: one that this kind of pipeline does not have.
    """
    from vistok.models.generators.base import MaskedGenerator

    known = pipeline.sampling_settings()
    names = {name: name for name in known}
    if isinstance(pipeline.transformer, MaskedGenerator):
        names["num_steps"] = names.pop("num_inference_steps")
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in names:
            raise ValueError(
                f"--{name.replace('_', '-')} is not a setting of a {type(pipeline.transformer).__name__}; "
                f"it has {', '.join(names)}"
            )
    return {names[name]: value for name, value in chosen.items()}


def _columns(num_images: int) -> int:
    """About COLUMNS, and such that no prompt's images are broken over rows unless there are very many."""
    return num_images * max(1, COLUMNS // num_images) if num_images <= MOST_COLUMNS else COLUMNS
