"""The demo as a person uses it, in headless Chromium: `pytest -m browser`.

Needs chromium, its driver and selenium; skipped where one of them is missing. Set VISTOK_SCREENSHOTS to a folder to keep
a picture of each page; that of a failed test is always kept.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny import save_tiny_pipeline

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
)
TIMEOUT = 120  # seconds; a loaded machine is slow to start the page
SCREENSHOTS = "VISTOK_SCREENSHOTS"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the demo of a tiny model runs."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'vistok[demo]'")
    from vistok.demos.app import build_app, serve

    app = build_app(str(save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny", seed=0)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield serve(app, port=port)
    app.close(verbose=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install selenium"
    )
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found; on Debian: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(programs["chromedriver"]))
    driver.set_page_load_timeout(TIMEOUT)
    yield driver
    driver.quit()


class Page:
    """The demo's page: what a person sees and does on it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def wait(self, what: str, condition: Any) -> Any:
        """What `condition()` gives once it is true."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, TIMEOUT, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition(), f"{what}, waited {TIMEOUT} s")

    def shown(self, selector: str) -> list[Any]:
        """The elements of a CSS selector that can be seen."""
        return [
            element
            for element in self.driver.find_elements("css selector", selector)
            if element.is_displayed()
        ]

    def press(self, text: str) -> None:
        """Click the button or tab with this text."""

        def button() -> Any:
            return next((found for found in self.shown("button") if found.text == text), None)

        self.wait(f"a button {text!r}", button).click()

    def write(self, label: str, text: str) -> None:
        """Replace the text of the field with this label."""
        field = self.wait(f"a field {label!r}", lambda: self._field(label))
        field.clear()
        field.send_keys(text)

    def read(self, label: str) -> str:
        """The text of the field with this label."""
        return self._field(label).get_attribute("value")

    def _field(self, label: str) -> Any:
        fields = [
            found
            for block in self.shown("label")
            if block.text.startswith(label)
            for found in block.find_elements("css selector", "textarea, input")
        ]
        return fields[0] if fields else None

    def loaded_images(self, selector: str) -> list[Any]:
        """The images of a selector whose pixels have arrived."""
        script = "return arguments[0].complete && arguments[0].naturalWidth > 0"
        return [image for image in self.shown(selector) if self.driver.execute_script(script, image)]

    def natural_size(self, image: Any) -> list[int]:
        """Width and height of the picture itself."""
        return self.driver.execute_script(
            "return [arguments[0].naturalWidth, arguments[0].naturalHeight]", image
        )


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The freshly loaded page; its picture is kept if the test fails."""
    failed_before = request.session.testsfailed
    browser.get(address)
    yield Page(browser)
    if request.session.testsfailed > failed_before or SCREENSHOTS in os.environ:
        folder = Path(os.environ.get(SCREENSHOTS) or tempfile.mkdtemp(prefix="vistok-screenshots-"))
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"{request.node.name}.png"
        browser.save_screenshot(str(picture))
        print(f"screenshot: {picture}")


def test_drawing_from_a_text(page: Page) -> None:
    page.write("What to draw", "green cat")
    page.press("Draw")
    pictures = page.wait("four pictures", lambda: _four(page.loaded_images(".grid-container img")))
    assert [page.natural_size(picture) for picture in pictures] == [[16, 16]] * 4


def _four(pictures: list[Any]) -> list[Any] | None:
    return pictures if len(pictures) == 4 else None


def test_an_empty_text_is_explained(page: Page) -> None:
    page.write("What to draw", " ")
    page.press("Draw")
    page.wait(
        "the message", lambda: "the prompt is empty" in page.driver.find_element("tag name", "body").text
    )


def test_tokenizing_a_picture(page: Page, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(tmp_path / "picture.png")
    page.press("Image to tokens")
    upload = page.wait("the upload", lambda: page.driver.find_elements("css selector", "input[type=file]"))[
        -1
    ]
    upload.send_keys(str(tmp_path / "picture.png"))
    page.wait("the picture", lambda: page.loaded_images("img"))
    page.press("Tokenize")
    page.wait("the figures", lambda: "6 tokens at 16 px" in page.read("Figures"))
    pair = page.wait(
        "original and reconstruction", lambda: page.loaded_images(".slider-wrap img, .image-container img")
    )
    assert [16, 16] in [page.natural_size(image) for image in pair]
    assert len(page.read("Token ids").split()) == 6


def test_fewer_tokens(page: Page, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(tmp_path / "picture.png")
    page.press("Image to tokens")
    upload = page.wait("the upload", lambda: page.driver.find_elements("css selector", "input[type=file]"))[
        -1
    ]
    upload.send_keys(str(tmp_path / "picture.png"))
    page.wait("the picture", lambda: page.loaded_images("img"))
    page.press("Tokenize")
    page.wait("all tokens", lambda: "6 tokens" in page.read("Figures"))
