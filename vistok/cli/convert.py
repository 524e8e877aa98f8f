"""`vistok convert`: an official checkpoint as one of our models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli.output import check_new_folder, report
from vistok.files import atomic_path


def convert(
    system: Annotated[str, typer.Argument(help="The system that the checkpoint belongs to, such as titok.")],
    checkpoint: Annotated[
        Path, typer.Argument(help="The official weights: .safetensors, or a pickle of tensors.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="New folder for the model, in our layout.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="The official configuration, JSON or YAML; known releases need none.")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(help="Which release it is, where several have the same shape.", metavar="NAME"),
    ] = None,
) -> None:
    """Convert an official checkpoint; `vistok.load(DIR)` then reads it."""
    check_new_folder(output)
    if config is not None and release is not None:
        raise ValueError("give --config or --release, not both")
    from vistok.models import upstream

    upstream.check_system(system)
    weights = upstream.read_checkpoint(checkpoint)
    if config is not None:
        settings: Mapping[str, Any] = upstream.load_config(config)
    else:
        settings = upstream.stored_config(checkpoint) or _known_config(
            system, weights, checkpoint.name, release
        )
    model = upstream.load(system, weights, settings)
    with atomic_path(output) as partial:
        model.save_pretrained(partial)
    files = sorted(output.glob("*.safetensors"))
    report(
        "convert",
        system=system,
        checkpoint=checkpoint.name,
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        files={file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        output=str(output),
    )


def _known_config(
    system: str, weights: Mapping[str, Any], file_name: str, release: str | None
) -> Mapping[str, Any]:
    """The configuration of the release called `release`, or of the one that a file of `weights` must be."""
    from vistok.models.upstream.releases import RELEASES, possible_releases

    if release is not None:
        names = [name for name, entry in RELEASES.items() if entry.system == system]
        if release not in names:
            close = " or ".join(get_close_matches(release, names)) or ", ".join(names)
            raise ValueError(f"unknown release {release!r} of {system}; did you mean {close}?")
        return RELEASES[release].complete_config()
    possible = [entry for entry in possible_releases(weights, file_name) if entry.system == system]
    if not possible:
        raise ValueError(
            f"these weights are no known release of {system}; give its configuration with --config FILE"
        )
    if len(possible) > 1:
        raise ValueError(
            f"several releases look like this: {', '.join(r.name for r in possible)}; say which: --release"
        )
    return possible[0].complete_config()


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
