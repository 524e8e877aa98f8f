"""`vistok eval`: distances between sets of images, and how well a tokenizer gives images back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.generate import sampling_settings
from vistok.cli.options import (
    DEFAULT_MODEL,
    MAX_SEED,
    BatchSize,
    Device,
    Dtype,
    Model,
    choose_device,
    choose_dtype,
)
from vistok.cli.output import report

if TYPE_CHECKING:
    from torch import Tensor

    from vistok.pipelines.base import ImagePipeline

SHORT_NAMES = {"inception": "inception-v3-compat"}


def fid(
    real: Annotated[Path, typer.Argument(help="Folder of real images.")],
    fake: Annotated[str, typer.Argument(help="Folder of images, or a model to sample from.")],
    extractor: Annotated[str, typer.Option(help="inception or efficientnet-lite0.")] = "inception",
    extractor_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Inception's weights, where they cannot be downloaded."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For a text model: a file with one prompt per line.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=2, help="Images to sample from a model.")] = 1000,
    guidance_scale: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    temperature: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    top_k: Annotated[int | None, typer.Option(help="[default: the model's]")] = None,
    top_p: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize and crop the pictures of folders to this first.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Sampled image i uses seed + i.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model; features are always float32.")] = "float32",
) -> None:
    """Fréchet and kernel distance of FAKE images from REAL ones."""
    from vistok.data.images import image_files
    from vistok.eval.features import load_extractor
    from vistok.eval.fid import compute_fid
    from vistok.hub import load_pipeline

    image_files(real)
    place = choose_device(device)
    features = load_extractor(
        SHORT_NAMES.get(extractor, extractor), weights_path=extractor_weights, device=place
    )
    source: Any = Path(fake)
    protocol: dict[str, Any] = {}
    if not _is_picture_folder(source):
        pipeline = load_pipeline(fake, device=place, dtype=choose_dtype(dtype))
        pipeline.set_progress_bar_config(disable=True)
        chosen = sampling_settings(
            pipeline, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        conditions = _conditions(pipeline, prompts)
        source = samples(pipeline, conditions, num_images, seed=seed, batch_size=batch_size, **chosen)
        protocol = {
            "model": fake,
            "sampling": pipeline.sampling_settings(**chosen),
            "num_prompts": len(conditions),
            "model_dtype": dtype,
        }
    result = compute_fid(
        real,
        source,
        extractor=features,
        batch_size=batch_size,
        image_size=image_size,
        fake_name=fake if protocol else None,
        seed=seed,
    )
    report("eval fid", **asdict(result), **protocol)


def _is_picture_folder(path: Path) -> bool:
    return path.is_dir() and not any((path / name).is_file() for name in ("model_index.json", "config.json"))


def _conditions(pipeline: ImagePipeline, prompts: Path | None) -> list[Any]:
    """The prompts of a file, or every class of a class-conditional model."""
    num_classes = getattr(pipeline.transformer, "num_classes", None)
    if prompts is None and num_classes is not None:
        return list(range(num_classes))
    if prompts is None:
        raise ValueError("this model draws from texts: give --prompts FILE with one prompt per line")
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{prompts} holds no prompts; write one per line")
    return lines


def samples(
    pipeline: Any,
    conditions: Sequence[Any],
    num_images: int,
    *,
    seed: int,
    batch_size: int,
    **sampling: Any,
) -> Iterator[Tensor]:
    """uint8 batches `[b 3 H W]`: image i is of condition i, in turn, with `seed + i`."""
    from vistok.eval.sources import to_uint8

    for start in range(0, num_images, batch_size):
        rows = range(start, min(start + batch_size, num_images))
        chosen = [conditions[i % len(conditions)] for i in rows]
        output: Any = pipeline(chosen, seed=[seed + i for i in rows], output_type="pt", **sampling)
        yield to_uint8(output.images)


def reconstruction(
    folder: Annotated[Path, typer.Argument(help="Folder of images.")],
    model: Model = DEFAULT_MODEL,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """PSNR, SSIM and codebook usage of a tokenizer on a folder of images."""
    from vistok.data.images import image_files
    from vistok.eval.reconstruction import evaluate_reconstruction
    from vistok.hub import load_tokenizer

    image_files(folder)
    tokenizer = load_tokenizer(model, device=choose_device(device), dtype=choose_dtype(dtype))
    result = evaluate_reconstruction(tokenizer, folder, batch_size=batch_size)
    report("eval reconstruction", model=model, **asdict(result))
