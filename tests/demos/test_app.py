from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vistok
from tests.pipelines.families import make_pipeline
from tests.tiny import save_tiny_pipeline
from vistok.data.images import load_image

gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A client of the running app, over HTTP."""
    from vistok.demos.app import build_app, serve

    app = build_app(str(model))
    assert app.analytics_enabled is False
    url = serve(app)
    try:
        yield gradio_client.Client(url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    finally:
        app.close(verbose=False)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_drawing_gives_the_library_s_images(client, model: Path) -> None:
    gallery = client.predict("cat", 3, 2, 1.5, 0.8, api_name="/generate")
    images = [np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in gallery]
    expected = vistok.load(model)(
        "cat", seed=3, num_images_per_prompt=2, guidance_scale=1.5, temperature=0.8
    ).images
    assert len(images) == 2
    for image, wanted in zip(images, expected, strict=True):
        assert np.array_equal(image, np.asarray(wanted))


@pytest.mark.parametrize(("chosen", "num_tokens"), [((), 6), ((2,), 2)])
def test_tokenizing_gives_both_images_the_psnr_and_the_ids(
    client, model: Path, picture: Path, chosen: tuple, num_tokens: int
) -> None:
    (original, reconstruction), figures, ids = client.predict(
        gradio_client.handle_file(picture), *chosen, api_name="/tokenize"
    )
    tokens = vistok.load(model / "tokenizer").encode(load_image(picture, 16)[None], num_tokens)
    assert ids == " ".join(map(str, tokens.data[0].tolist()))
    assert figures.startswith("PSNR ") and f"{num_tokens} tokens at 16 px" in figures
    before, after = (np.asarray(Image.open(path).convert("RGB")) for path in (original, reconstruction))
    assert before.shape == after.shape == (16, 16, 3) and not np.array_equal(before, after)


def test_a_bad_prompt_is_shown(client) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match="the prompt is empty"):
        client.predict("", 0, 1, 1.0, 1.0, api_name="/generate")


def test_bad_pictures_are_shown(client, tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "small.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="smaller than one 8-pixel patch"):
        client.predict(gradio_client.handle_file(tmp_path / "small.png"), api_name="/tokenize")


def components(app, kind: str, label: str) -> list[dict]:
    """Properties of the page's components of a kind with a label."""
    return [
        part["props"]
        for part in app.get_config_file()["components"]
        if part["type"] == kind and part["props"].get("label") == label
    ]


@pytest.mark.parametrize("is_variable", [True, False])
def test_the_slider_of_tokens_is_for_variable_length_only(
    model: Path, monkeypatch, is_variable: bool
) -> None:
    from vistok.demos.app import build_app

    monkeypatch.setattr(vistok.ConvTiTok, "variable_length", is_variable)
    (slider,) = components(build_app(str(model)), "slider", "Tokens")
    assert slider["visible"] is is_variable
    assert (slider["minimum"], slider["maximum"], slider["value"]) == (1, 6, 6)


def test_the_page_itself_is_served_and_names_no_outside_font(client) -> None:
    import httpx

    page = httpx.get(client.src).text
    assert "vistok" in page and "fonts.googleapis.com" not in page


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(monkeypatch) -> None:
    from vistok.demos import app

    def generate(prompt: str) -> str:
        warnings.warn("it was cut", stacklevel=1)
        return prompt

    shown = []
    monkeypatch.setattr(app.gr, "Warning", shown.append)
    assert app._showing_errors(generate)("a cat") == "a cat" and shown == ["it was cut"]


@pytest.mark.parametrize("family", ["llamagen-class", "maskgit-bert"])
def test_a_model_of_classes_gets_a_class_box(tmp_path: Path, family: str) -> None:
    from vistok.demos import app

    pipeline = make_pipeline(family)
    pipeline.save_pretrained(tmp_path)
    page = app.build_app(str(tmp_path))
    (box,) = components(page, "textbox", "Class")
    assert box["value"] == "0"
    (slider,) = components(page, "slider", "Temperature")
    assert slider["value"] == (4.5 if family == "maskgit-bert" else 1.0)
    setting = "choice_temperature" if family == "maskgit-bert" else "temperature"
    drawn = app.generate(pipeline, "3", 7.0, 2.0, 2.0, 0.5)
    expected = pipeline(3, seed=7, num_images_per_prompt=2, guidance_scale=2.0, **{setting: 0.5}).images
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]


def test_a_model_without_a_temperature_gets_no_slider_for_it(tmp_path: Path) -> None:
    from vistok.demos import app

    pipeline = make_pipeline("xar-cells")
    pipeline.save_pretrained(tmp_path)
    assert components(app.build_app(str(tmp_path)), "slider", "Temperature") == []
    (drawn,) = app.generate(pipeline, "3", 7.0, 1.0, 2.0)
    assert drawn.tobytes() == pipeline(3, seed=7, guidance_scale=2.0).images[0].tobytes()


def test_a_model_that_draws_nothing_is_refused(model: Path) -> None:
    from vistok.demos.app import build_app

    with pytest.raises(ValueError, match="is a ConvTiTok, not a pipeline"):
        build_app(str(model / "tokenizer"))


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys) -> None:
    import sys

    from vistok.cli.main import main

    monkeypatch.delitem(sys.modules, "vistok.demos.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 2 and "pip install 'vistok[demo]'" in capsys.readouterr().err
