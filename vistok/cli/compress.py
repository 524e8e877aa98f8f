"""`vistok compress` and `vistok decompress`: one picture to a file of a few dozen bytes, and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistok.cli.options import DEFAULT_MODEL, Device, Model, choose_device
from vistok.cli.output import PICTURE_SUFFIXES, check_file, report
from vistok.cli.reconstruct import decibels
from vistok.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from vistok.codec.codec import ImageCodec
    from vistok.codec.container import Container

SUFFIXES = (".vtk",)


def compress(
    source: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The compressed file, ending in .vtk.")
    ],
    num_tokens: Annotated[
        int | None, typer.Option(help="Keep the first tokens only, where the tokenizer allows it.")
    ] = None,
    target_psnr: Annotated[
        float | None, typer.Option(metavar="DB", help="As few tokens as give this PSNR.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    prior: Annotated[
        bool, typer.Option("--prior", help="Smaller, slower: code with the probabilities of its generator.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Compress a picture: its centre square at the tokenizer's size."""
    check_file(output, SUFFIXES)
    if num_tokens is not None and target_psnr is not None:
        raise ValueError("give --num-tokens or --target-psnr, not both")
    from vistok.codec.container import Container
    from vistok.data.images import open_rgb

    picture = open_rgb(source)
    codec = load_codec(model, with_generator=prior, device=choose_device(device))
    started = time.perf_counter()
    try:
        data = codec.compress(picture, num_tokens=num_tokens, target_psnr=target_psnr)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    seconds = time.perf_counter() - started
    container = Container.from_bytes(data)
    # Decoded from the file's own bytes: nothing is written that cannot be read.
    quality = _psnr(codec.decode(codec.unpack(container)), picture, codec.tokenizer.image_size)
    with atomic_path(output) as partial:
        partial.write_bytes(data)
    report(
        "compress",
        **_facts(model, codec, container, len(data)),
        target_psnr=target_psnr,
        psnr=decibels(quality),
        rounding="uint8, nearest; data range 255",
        device=str(codec.tokenizer.device),
        seconds=round(seconds, 3),
        output=str(output),
    )


def decompress(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `vistok compress` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="IMAGE", help="The picture to write, such as photo.png.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"The model that made the file. [default: the one it names, or {DEFAULT_MODEL}]",
            metavar="NAME",
        ),
    ] = None,
    original_size: Annotated[
        bool,
        typer.Option("--original-size", help="Resize to the size of the square that was cut out originally."),
    ] = False,
    device: Device = "auto",
) -> None:
    """Restore a picture that was compressed."""
    check_file(output, PICTURE_SUFFIXES)
    from vistok.codec.codec import resize_to_original
    from vistok.codec.container import Container

    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist or is not a file")
    data = source.read_bytes()
    try:
        container = Container.from_bytes(data)
        name = model or _model_named_in(container)
        codec = load_codec(name, with_generator=container.prior is not None, device=choose_device(device))
        started = time.perf_counter()
        tokens = codec.unpack(container)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    picture = codec.decode(tokens)
    seconds = time.perf_counter() - started
    if original_size:
        picture = resize_to_original(picture, container.original_size)
    with atomic_path(output) as partial:
        picture.save(partial)
    report(
        "decompress",
        **_facts(name, codec, container, len(data)),
        size=list(picture.size),
        device=str(codec.tokenizer.device),
        seconds=round(seconds, 3),
        output=str(output),
    )


def load_codec(model: str, *, with_generator: bool, device: str) -> ImageCodec:
    """The codec of the tokenizer, and of the generator if wanted, that `model` has.

    Raises:
        ValueError: as `vistok.load`; or a codec cannot be made of it.
    """
    from vistok.codec.codec import ImageCodec
    from vistok.hub import known_names, load_pipeline, load_tokenizer

    name = model if model in known_names() and model != DEFAULT_MODEL else ""  # paths mean nothing elsewhere
    if not with_generator:
        return ImageCodec(load_tokenizer(model, device=device), model=name)
    pipeline = load_pipeline(model, device=device)
    return ImageCodec(pipeline.tokenizer, pipeline.transformer, model=name)


def _model_named_in(container: Container) -> str:
    """Only names that vistok itself knows: a file must not make it load any folder or hub repository."""
    from vistok.hub import known_names

    if container.model and container.model not in known_names():
        raise ValueError(f"made with {container.model!r}, which is unknown here; give its model with --model")
    return container.model or DEFAULT_MODEL


def _facts(model: str, codec: ImageCodec, container: Container, num_bytes: int) -> dict[str, object]:
    """What both commands report of a file."""
    side = codec.tokenizer.image_size
    return {
        "model": model,
        "tokenizer": codec.identity,
        "entropy_model": "uniform" if container.prior is None else codec.generator_identity,
        "num_tokens": container.num_tokens,
        "bytes": num_bytes,
        "header_bytes": num_bytes - len(container.payload),
        "bits_per_pixel": round(8 * num_bytes / side**2, 4),
        "image_size": side,
        "original_size": list(container.original_size),
    }


def _psnr(picture: Image, original: Image, image_size: int) -> float:
    from vistok.data.images import resize_and_crop
    from vistok.eval.reconstruction import psnr
    from vistok.eval.sources import pixels

    reference = resize_and_crop(original, image_size)
    return psnr(pixels(picture)[None], pixels(reference)[None]).item()
