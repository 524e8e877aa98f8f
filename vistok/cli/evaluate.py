"""`vistok eval`: distances between sets of images, how well a tokenizer gives images back, and at how many bytes."""

from __future__ import annotations

import logging
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
from vistok.cli.output import check_folder, filled_folder, report

if TYPE_CHECKING:
    from torch import Tensor

    from vistok.eval.distances import Distance
    from vistok.eval.rate_distortion import Method, TokenizerMethod
    from vistok.pipelines.base import ImagePipeline

logger = logging.getLogger(__name__)

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


def rate_distortion(
    source: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images, or a parquet file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="For the JSON, CSV, plot and report.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="A tokenizer; repeat for several."),
    ] = None,
    codecs: Annotated[str, typer.Option(help="Classical codecs; `none` for none.")] = "jpeg,webp,avif",
    num_tokens: Annotated[
        str | None, typer.Option(metavar="LIST", help="Prefix lengths. [default: 1, 2, 4, ... and all]")
    ] = None,
    distances: Annotated[
        str,
        typer.Option(help="Besides PSNR and SSIM; one whose weights cannot be had is left out and named."),
    ] = "lpips,efficientnet-lite0",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize and crop to this. [default: the tokenizers' size]")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Evenly spread over the source. [default: all]")
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Bytes per pixel against PSNR, SSIM and perceptual distance, for tokenizers and classical codecs."""
    check_folder(output if output.exists() else output.parent)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    from vistok.eval.classical_codecs import load_codec
    from vistok.eval.rate_distortion import ClassicalMethod, measure_rate_distortion
    from vistok.eval.rate_distortion_report import check_plotting, write_report

    check_plotting()
    place = choose_device(device)
    classical = [ClassicalMethod(load_codec(name)) for name in _names(codecs)]
    lengths = None if num_tokens is None else _numbers(num_tokens, "--num-tokens")
    tokenizers = _tokenizer_methods(models or [], lengths, place, dtype)
    measured, unavailable = _distances(_names(distances), place)
    methods: list[Method] = [*tokenizers, *classical]
    result = measure_rate_distortion(
        source,
        methods,
        measured,
        unavailable=unavailable,
        image_size=_common_size(image_size, tokenizers),
        num_images=num_images,
        batch_size=batch_size,
    )
    with filled_folder(output) as folder:
        files = write_report(result, folder)
    report("eval rate-distortion", **asdict(result), output=[str(output / file.name) for file in files])


def speculative(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="For JSON, plot and report; continued if it has some."
        ),
    ],
    model: Model = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a generator that comes without one.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Real images: the emoji set, or CIFAR-10 for a model of its classes."
        ),
    ] = None,
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            metavar="NAME[@TREE]",
            help="As of `vistok generate`; repeat for several. TREE is chain-N, adaptive-N, confident-N, dynamic-N or "
            "children per level such as 3x2x1. [default: those without training]",
        ),
    ] = None,
    accept: Annotated[str, typer.Option(help="Rules: strict, lantern.")] = "strict,lantern",
    lantern_k: Annotated[
        str, typer.Option(metavar="LIST", help="Neighbours that stand for a code.")
    ] = "10,100",
    lantern_delta: Annotated[str, typer.Option(metavar="LIST", help="Bounds on what they add.")] = "0.1,0.4",
    num_images: Annotated[int, typer.Option(min=2, help="Images of each row.")] = 100,
    batches: Annotated[str, typer.Option(metavar="LIST", help="Batch sizes that are timed.")] = "1,4,16",
    num_timed: Annotated[
        int | None, typer.Option(min=1, help="Images of a timed call. [default: the largest batch]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")] = 3,
    extractor: Annotated[str, typer.Option(help="inception or efficientnet-lite0.")] = "efficientnet-lite0",
    guidance_scale: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    temperature: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    top_k: Annotated[int | None, typer.Option(help="[default: the model's]")] = None,
    top_p: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """What speculative decoding gains and costs: passes, time, quality, and whether tokens follow the model."""
    check_folder(output if output.exists() else output.parent)
    from vistok.eval.rate_distortion_report import check_plotting
    from vistok.eval.speculative import Protocol, evaluate_speculative
    from vistok.eval.speculative_methods import default_names, named_drafters, named_rules
    from vistok.eval.speculative_report import write_report
    from vistok.eval.speculative_subject import Parts, load_subject

    check_plotting()
    place, sizes = choose_device(device), _numbers(batches, "--batches")
    ks, deltas = _numbers(lantern_k, "--lantern-k"), _decimals(lantern_delta, "--lantern-delta")
    sampling = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    parts = Parts.load(model, tokenizer, sampling, device=place, dtype=choose_dtype(dtype))
    rules = named_rules(_names(accept), parts.tokenizer, ks, deltas)
    texts = drafters or default_names(parts.model)
    chosen = [one for text in texts for one in named_drafters(text, parts.model)]
    output.mkdir(exist_ok=True)
    subject, judge = load_subject(parts, data, num_images, SHORT_NAMES.get(extractor, extractor), output)
    protocol = Protocol.of(
        subject, judge, num_timed=num_timed or max(sizes), batch_sizes=sizes, repeats=repeats
    )
    result = evaluate_speculative(subject, judge, chosen, rules, protocol, output)
    files = write_report(result, output)
    report("eval speculative", **asdict(result), output=[str(file) for file in files])


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers and commas, such as 1,2,4; got {text!r}") from None


def _decimals(text: str, option: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers and commas, such as 0.1,0.4; got {text!r}") from None


def _tokenizer_methods(
    models: list[str], num_tokens: list[int] | None, device: str, dtype: str
) -> list[TokenizerMethod]:
    from vistok.eval.rate_distortion import TokenizerMethod
    from vistok.hub import load_tokenizer

    methods = []
    for model in models:
        tokenizer = load_tokenizer(model, device=device, dtype=choose_dtype(dtype))
        # Results travel; the folders of one machine should not.
        name = Path(model).resolve().name if Path(model).exists() else model
        methods.append(TokenizerMethod(name, tokenizer, num_tokens))
    return methods


def _distances(names: list[str], device: str) -> tuple[list[Distance], dict[str, str]]:
    """Those whose weights can be had, and what is missing for the others."""
    from vistok.eval.distances import load_distance

    measured, unavailable = [], {}
    for name in names:
        try:
            measured.append(load_distance(name, device))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            unavailable[name] = str(error).split(". ")[0]  # what is missing; what to do follows it
            logger.warning("%s is not measured: %s", name, error)
    return measured, unavailable


def _common_size(image_size: int | None, tokenizers: Sequence[TokenizerMethod]) -> int | None:
    """The size at which every method codes the same pixels."""
    wanted = {method.name: method.tokenizer.image_size for method in tokenizers}
    sizes = {image_size, *wanted.values()} - {None}
    if len(sizes) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in wanted.items())
        asked = "" if image_size is None else f", and --image-size {image_size} was asked for"
        raise ValueError(f"all methods must code the same pixels; the tokenizers' sizes are {listed}{asked}")
    return sizes.pop() if sizes else None
