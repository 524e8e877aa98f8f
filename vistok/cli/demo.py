"""`vistok demo`: the app in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from vistok.cli.options import DEFAULT_MODEL, Device, Model, choose_device
from vistok.cli.output import report


def demo(
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes the first free one from 7860.")] = 0,
    share: Annotated[bool, typer.Option(help="Also through a public link of gradio's.")] = False,
    device: Device = "auto",
) -> None:
    """Try a model in the browser; Ctrl-C ends it."""
    try:
        from vistok.demos.app import build_app, serve, wait
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the demo needs {error.name}: pip install 'vistok[demo]'") from None

    app = build_app(model, device=choose_device(device))
    url = serve(app, host=host, port=port, share=share)
    report("demo", model=model, url=url)
    wait(app)
