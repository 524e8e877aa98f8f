"""`vistok generate`: images from texts or classes."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.options import DEFAULT_MODEL, Device, Dtype, Model, Output, Seed, choose_device, choose_dtype
from vistok.cli.output import PictureOutput, report

if TYPE_CHECKING:
    from vistok.pipelines.base import ImagePipeline

COLUMNS, MOST_COLUMNS = 6, 8


def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(help="What to draw: texts; for a class-conditional model class names or indices."),
    ],
    output: Output,
    model: Model = DEFAULT_MODEL,
    num_images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    seed: Seed = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is off. [default: the model's]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0. [default: the model's]")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k likeliest tokens. [default: the model's]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep this much probability, in (0, 1]. [default: the model's]")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Draw images: one picture, a labelled grid, or a folder of pictures."""
    target = PictureOutput.parse(output)
    from vistok.hub import load_pipeline

    started = time.perf_counter()
    pipeline: Any = load_pipeline(model, device=choose_device(device), dtype=choose_dtype(dtype))
    sampling = sampling_settings(
        pipeline, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
    )
    loaded = time.perf_counter()
    pictures = pipeline(prompts, num_images_per_prompt=num_images, seed=seed, **sampling).images
    seconds = time.perf_counter() - loaded
    labels = [prompt for prompt in prompts for _ in range(num_images)]
    target.save(pictures, labels, _columns(num_images))
    report(
        "generate",
        model=model,
        prompts=prompts,
        num_images=len(pictures),
        seed=seed,
        sampling=pipeline.sampling_settings(**sampling),
        device=str(pipeline.device),
        dtype=dtype,
        load_seconds=round(loaded - started, 3),
        seconds=round(seconds, 3),
        tokens_per_second=round(len(pictures) * pipeline.transformer.num_tokens / seconds, 1),
        output=output,
    )


def sampling_settings(pipeline: ImagePipeline, **given: Any) -> dict[str, Any]:
    """Those settings that are not `None`.

    Raises:
        ValueError: one that this kind of pipeline does not have.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    known = list(inspect.signature(pipeline.sampling_settings).parameters)
    for name in chosen:
        if name not in known:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is not a setting of a {type(pipeline).__name__}; it has {', '.join(known)}"
            )
    return chosen


def _columns(num_images: int) -> int:
    """About COLUMNS, and such that no prompt's images are broken over rows unless there are very many."""
    return num_images * max(1, COLUMNS // num_images) if num_images <= MOST_COLUMNS else COLUMNS
