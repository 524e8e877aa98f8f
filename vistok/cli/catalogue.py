"""`vistok models` and `vistok info`: what can be loaded, and what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.options import AsJson
from vistok.cli.output import report

if TYPE_CHECKING:
    from vistok.models.upstream.releases import Release
    from vistok.zoo import ShippedModel

COLUMNS = ("name", "kind", "MB", "licence", "metrics")


def models(as_json: AsJson = False) -> None:
    """List the shipped models and the known official releases."""
    from vistok.models.upstream.releases import RELEASES
    from vistok.zoo import shipped

    rows = [_shipped_row(model) for model in shipped().values()]
    rows += [_release_row(release) for release in RELEASES.values()]
    if as_json:
        report("models", models=rows)
        return
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    for row in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    typer.echo(
        "\nShipped models are in the package. `vistok info NAME` says more, and where a release's weights go."
    )


def _shipped_row(model: ShippedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": f"shipped {model.class_name}",
        "size_mb": round(model.size_mb, 1),
        "licence": model.facts.get("licence"),
        "metrics": {f"{name} (measured)": value for name, value in model.facts.get("metrics", {}).items()},
    }


def _release_row(release: Release) -> dict[str, Any]:
    return {
        "name": release.name,
        "kind": f"release of {release.system}",
        "size_mb": release.size_mb,
        "licence": release.licence,
        "metrics": {_as_published(name): value for name, value in release.metrics.items()},
    }


def _as_published(name: str) -> str:
    return name if "published" in name else f"{name} (published)"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = ", ".join(f"{name}: {value}" for name, value in row["metrics"].items())
    return (row["name"], row["kind"], _megabytes(row["size_mb"]), row["licence"] or "-", metrics or "-")


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size:.0f}"


def info(
    name: Annotated[str, typer.Argument(help="A name from `vistok models`, a folder, a file or a hub id.")],
    as_json: AsJson = False,
) -> None:
    """Say what a model is: parts, sizes, licence, metrics, settings."""
    from vistok.hub import load
    from vistok.models.upstream.releases import RELEASES
    from vistok.zoo import shipped

    if name in RELEASES:
        facts = _release_facts(RELEASES[name])
    else:
        shipped_model = shipped().get(name)
        facts = (_shipped_row(shipped_model) | shipped_model.facts) if shipped_model else {"name": name}
        facts |= model_facts(load(name))
    if as_json:
        report("info", model=facts)
    else:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def _release_facts(release: Release) -> dict[str, Any]:
    from vistok.hub import releases_folder

    place = releases_folder() / release.name
    is_here = all((place / file).is_file() for file in release.files[:1])
    return {
        **asdict(release),
        "kind": f"release of {release.system}",
        "weights": str(place / release.files[0])
        if is_here
        else f"not here: the hub, or put by hand at {place}",
    }


def model_facts(model: Any) -> dict[str, Any]:
    """Class, sizes and settings of a pipeline, or of a tokenizer or generator."""
    facts: dict[str, Any] = {"class": type(model).__name__}
    if hasattr(model, "components"):
        facts["sampling"] = model.sampling_settings()
        facts["parts"] = {name: _part_facts(part) for name, part in model.components.items()}
        return facts
    return facts | _part_facts(model)


def _part_facts(part: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "class": type(part).__name__,
        "parameters": sum(parameter.numel() for parameter in part.parameters()),
    }
    for name in (
        "image_size",
        "num_tokens",
        "codebook_size",
        "variable_length",
        "num_classes",
        "text_length",
    ):
        if hasattr(part, name):
            facts[name] = getattr(part, name)
    facts["layout"] = str(part.layout)
    if hasattr(part, "identity"):
        facts["identity"] = part.identity()
    return facts
