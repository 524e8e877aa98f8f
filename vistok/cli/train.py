"""`vistok train`: a model from a recipe."""

from __future__ import annotations

import logging
import time
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.options import Device, choose_device
from vistok.cli.output import check_folder, report

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one of the package's recipes.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the run; made if it does not exist."),
    ],
    device: Device = "auto",
) -> None:
    """Train a model; the same command continues an interrupted run."""
    path = find_recipe(recipe)
    _check_run_folder(output)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from vistok.training.recipe import load_recipe
    from vistok.training.run import run

    content, place = load_recipe(path), choose_device(device)
    logging.getLogger("vistok").setLevel(logging.INFO)  # held-out measurements, above the progress bar
    started = time.perf_counter()
    with logging_redirect_tqdm():
        measured = run(content, output, device=place)
    report(
        "train",
        recipe=content.to_dict(),
        seed=content.seed,
        device=place,
        seconds=round(time.perf_counter() - started, 3),
        measured=measured,
        output=str(output / "model"),
    )


def find_recipe(name: str) -> Path:
    """The file `name`, or the package's recipe of that name.

    Raises:
        FileNotFoundError: neither exists; the package's recipes are listed.
    """
    own = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name.removesuffix(".yaml") in own:
        return own[name.removesuffix(".yaml")]
    close = get_close_matches(Path(name).stem, own, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the package's own are {', '.join(own)}"
    raise FileNotFoundError(f"recipe {name} does not exist; {hint}")


def _check_run_folder(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the run")
    while not folder.exists():
        folder = folder.parent
    check_folder(folder)
