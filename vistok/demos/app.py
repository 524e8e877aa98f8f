"""A Gradio app around one pipeline: draw from a text or a class; turn a picture into tokens and back."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from vistok.data.images import open_rgb, resize_and_crop, to_pil, to_tensor
from vistok.eval.reconstruction import psnr
from vistok.eval.sources import pixels
from vistok.hub import load_pipeline
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.pipelines.base import ImagePipeline
from vistok.pipelines.class_to_image import ClassToImagePipeline

MAX_IMAGES = 16
# By default a gallery has a fixed height with a scroll bar, and a comparison cuts off what is too high for it.
CSS = """
#images .grid-wrap { min-height: 0; overflow-y: auto; }
#comparison img { object-fit: contain; height: 100%; }
"""
PICTURE_HEIGHT = 340  # pixels on the page
TEMPERATURES = {"temperature": (0.1, 2, 0.05), "choice_temperature": (0, 20, 0.5)}  # lowest, highest, step


def build_app(model: str = "emoji-64", *, device: str = "cpu") -> gr.Blocks:
    """The app, not yet started; see `serve`.

    Raises:
        ValueError: an unknown model, or one that does not draw.
    """
    pipeline = load_pipeline(model, device=device)
    pipeline.set_progress_bar_config(disable=True)
    with gr.Blocks(title=f"vistok: {model}", analytics_enabled=False) as app:
        gr.Markdown(f"# vistok\n{_introduction(model, pipeline.tokenizer)}")
        with gr.Tab("Class to image" if isinstance(pipeline, ClassToImagePipeline) else "Text to image"):
            _generation_tab(pipeline)
        with gr.Tab("Image to tokens"):
            _tokenization_tab(pipeline.tokenizer)
    return app


def serve(app: gr.Blocks, *, host: str = "127.0.0.1", port: int = 0, share: bool = False) -> str:
    """Start the app in the background and return its address; `port=0` takes the first free one from 7860.

    Raises:
        OSError: no such port is free.
    """
    _, url, shared_url = app.launch(
        server_name=host,
        server_port=port or None,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=["api"],
        css=CSS,
    )
    return shared_url or url


def wait(app: gr.Blocks) -> None:
    """Block until Ctrl-C, then close the app."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        app.close(verbose=False)


def generate(
    pipeline: ImagePipeline,
    prompt: str,
    seed: float,
    num_images: float,
    guidance_scale: float,
    temperature: float | None = None,
) -> list[Image.Image]:
    """What the button of the first tab does; numbers come from the browser as floats."""
    draw: Any = pipeline
    settings: dict[str, float | None] = {"guidance_scale": guidance_scale}
    if (name := _temperature_of(pipeline)) is not None:
        settings[name] = temperature
    return draw(prompt, num_images_per_prompt=int(num_images), seed=int(seed), **settings).images


def _temperature_of(pipeline: ImagePipeline) -> str | None:
    """What the kind of the generator calls its randomness; `None` where that is fixed."""
    return next((name for name in TEMPERATURES if name in pipeline.sampling_settings()), None)


@torch.inference_mode()
def reconstruct(
    tokenizer: ImageTokenizer, path: str | None, num_tokens: float
) -> tuple[tuple[Image.Image, Image.Image], str, str]:
    """What the second tab does with the first `num_tokens`: (original, reconstruction), figures, the token ids."""
    if path is None:
        raise ValueError("upload a picture first")
    original = resize_and_crop(open_rgb(Path(path)), tokenizer.image_size, smallest=tokenizer.patch_size)
    tokens = tokenizer.encode(to_tensor(original)[None].to(tokenizer.device), int(num_tokens))
    reconstruction = to_pil(tokenizer.decode(tokens))[0]
    value = psnr(pixels(reconstruction)[None], pixels(original)[None]).item()
    figures = f"PSNR {value:.2f} dB, {tokens.data.shape[1]} tokens at {tokenizer.image_size} px"
    return (original, reconstruction), figures, " ".join(map(str, tokens.data[0].tolist()))


def _generation_tab(pipeline: ImagePipeline) -> None:
    preset = pipeline.sampling_settings()
    if isinstance(pipeline, ClassToImagePipeline):
        prompt = gr.Textbox("0", label="Class", info="its number, or its ImageNet name", elem_id="prompt")
    else:
        prompt = gr.Textbox("red apple", label="What to draw", elem_id="prompt")
    with gr.Row():
        seed = gr.Number(0, label="Seed", info="of the first image", precision=0, minimum=0)
        num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images", info="seeds count up")
        guidance_scale = gr.Slider(
            1, 10, preset["guidance_scale"], step=0.1, label="Guidance scale", info="1 is off"
        )
        temperature = _temperature_slider(_temperature_of(pipeline), preset)
    button = gr.Button("Draw", variant="primary")
    gallery = gr.Gallery(label="Images", elem_id="images", columns=4, height="auto", format="png")
    inputs = [prompt, seed, num_images, guidance_scale, *temperature]
    gr.on(
        [button.click, prompt.submit],
        _showing_errors(functools.partial(generate, pipeline)),
        inputs,
        gallery,
        api_name="generate",
    )


def _temperature_slider(name: str | None, preset: dict[str, Any]) -> list[gr.Slider]:
    """One slider, or none where there is nothing to choose."""
    if name is None:
        return []
    lowest, highest, step = TEMPERATURES[name]
    return [gr.Slider(lowest, highest, preset[name], step=step, label="Temperature", info="low is careful")]


def _tokenization_tab(tokenizer: ImageTokenizer) -> None:
    with gr.Row():
        with gr.Column():
            picture = gr.Image(
                type="filepath",
                image_mode=None,
                label="Picture",
                elem_id="picture",
                sources=["upload", "clipboard"],
                height=PICTURE_HEIGHT,
            )
            num_tokens = gr.Slider(
                1,
                tokenizer.num_tokens,
                tokenizer.num_tokens,
                step=1,
                label="Tokens",
                elem_id="num-tokens",
                info="the picture is decoded from the first ones alone",
                visible=tokenizer.variable_length,
            )
            button = gr.Button("Tokenize", variant="primary")
        with gr.Column():
            slider = gr.ImageSlider(
                label="Original and reconstruction", elem_id="comparison", format="png", height=PICTURE_HEIGHT
            )
            figures = gr.Textbox(label="Figures", elem_id="figures")
            ids = gr.Textbox(label="Token ids", elem_id="token-ids", lines=4, max_lines=8, buttons=["copy"])
    gr.on(
        [button.click, num_tokens.release],
        _showing_errors(functools.partial(reconstruct, tokenizer)),
        [picture, num_tokens],
        [slider, figures, ids],
        api_name="tokenize",
    )


def _introduction(model: str, tokenizer: ImageTokenizer) -> str:
    size, codebook_size = tokenizer.image_size, tokenizer.codebook_size
    up_to = "up to " if tokenizer.variable_length else ""
    codes = "" if codebook_size is None else f", each one of {codebook_size} codes"
    return f"`{model}` draws images of {size}x{size} pixels. An image is {up_to}{tokenizer.num_tokens} tokens{codes}."


def _showing_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with what it says about its input shown to the user."""

    def shown(*arguments: Any) -> Any:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            try:
                result = function(*arguments)
            except (ValueError, OSError) as error:
                raise gr.Error(str(error)) from None
        for warning in said:
            gr.Warning(str(warning.message))
        return result

    return shown
