"""The `vistok` command. Commands import what they need when they run, so that help is instant."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import vistok
from vistok.cli import (
    bench,
    catalogue,
    compress,
    convert,
    demo,
    detect,
    doctor,
    evaluate,
    generate,
    reconstruct,
    tokenize,
    train,
)
from vistok.cli.errors import explain

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Commands(TyperGroup):
    """The one place where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            message = explain(error)
            if message is None:
                raise
            is_interrupt = isinstance(error, KeyboardInterrupt)
            end_of_line = "\n" if is_interrupt else ""  # of a progress bar and the terminal's ^C
            typer.echo(f"{end_of_line}vistok: error: {message}", err=True)
            raise typer.Exit(INTERRUPTED if is_interrupt else BAD_INPUT) from None


def _options(**more: Any) -> dict[str, Any]:
    plain = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
    return {"no_args_is_help": True, **plain, **more}


app = typer.Typer(
    cls=Commands,
    help="Image tokenizers and autoregressive image generators: tokenize, generate, decode.",
    epilog="Progress goes to stderr, one line of JSON with the protocol to stdout.",
    **_options(),
)
evaluation = typer.Typer(help="Measure models and images.", **_options())
evaluation.command("fid")(evaluate.fid)
evaluation.command("reconstruction")(evaluate.reconstruction)
evaluation.command("rate-distortion")(evaluate.rate_distortion)
evaluation.command("speculative")(evaluate.speculative)
app.command("generate")(generate.generate)
app.command("detect")(detect.detect)
app.command("tokenize")(tokenize.tokenize)
app.command("detokenize")(tokenize.detokenize)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("compress")(compress.compress)
app.command("decompress")(compress.decompress)
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("models")(catalogue.models)
app.command("info")(catalogue.info)
app.command("doctor")(doctor.doctor)
app.add_typer(evaluation, name="eval")
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vistok {vistok.__version__}")
        raise typer.Exit()


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    logging.basicConfig(format="vistok: %(message)s", stream=sys.stderr)
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # it is told more than it shows


def _show_warning(message: object, *place: object) -> None:
    typer.echo(f"vistok: warning: {message}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, that of this process by default; always ends with SystemExit."""
    app(arguments, prog_name="vistok")
