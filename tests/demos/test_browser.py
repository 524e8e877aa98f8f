"""The demo as a person uses it, in headless Chromium: `pytest -m browser`.

Needs chromium, its driver and selenium; skipped where one of them is missing. Set VISTOK_SCREENSHOTS to a folder to keep
a picture of each page; that of a failed test is always kept.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
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
    """The demo's page: what a person sees and does on it. Parts are named by CSS selectors."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """What `condition()` gives once it is true."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.wait import WebDriverWait

        # The page is being redrawn while we look: what was just found may be gone.
        wait = WebDriverWait(self.driver, TIMEOUT, ignored_exceptions=[WebDriverException])
        return wait.until(lambda _: condition(), f"no {what} after {TIMEOUT} s")

    def find(self, selector: str) -> list[Any]:
        """Elements that can be seen."""
        found = self.driver.find_elements("css selector", selector)
        return [element for element in found if element.is_displayed()]

    def press(self, text: str) -> None:
        """Click the button or tab with this text."""

        def is_pressed() -> bool:
            buttons = [button for button in self.find("button") if button.text == text]
            for button in buttons[:1]:
                button.click()
            return bool(buttons)

        self.wait(f"button {text!r}", is_pressed)

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field."""
        from selenium.webdriver.common.keys import Keys

        (field,) = self.wait(f"field {selector}", lambda: self.find(selector))
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def read(self, selector: str) -> str:
        """The text of a field."""
        (field,) = self.find(selector)
        return field.get_attribute("value")

    def picture_sizes(self, selector: str) -> list[list[int]]:
        """Width and height of the pictures whose pixels have arrived."""
        script = (
            "return arguments[0].complete ? [arguments[0].naturalWidth, arguments[0].naturalHeight] : [0, 0]"
        )
        sizes = [self.driver.execute_script(script, image) for image in self.find(selector)]
        return [size for size in sizes if min(size) > 0]

    def upload(self, selector: str, path: Path) -> None:
        """Give a file to an upload field, which is never visible itself, and wait for the picture."""
        fields = self.wait(
            "upload", lambda: self.driver.find_elements("css selector", f"{selector} input[type=file]")
        )
        fields[0].send_keys(str(path))
        self.wait("uploaded picture", lambda: self.picture_sizes(f"{selector} img"))


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
        sys.stderr.write(f"screenshot: {picture}\n")


def test_drawing_from_a_text(page: Page) -> None:
    page.write("#prompt textarea, #prompt input", "green cat")
    page.press("Draw")
    page.wait("four pictures", lambda: page.picture_sizes("#images img") == [[16, 16]] * 4)


def test_an_empty_text_is_explained(page: Page) -> None:
    page.write("#prompt textarea, #prompt input", " ")
    page.press("Draw")
    page.wait("message", lambda: "the prompt is empty" in page.driver.find_element("tag name", "body").text)


def test_tokenizing_a_picture_with_all_tokens_and_with_two(page: Page, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(tmp_path / "picture.png")
    page.press("Image to tokens")
    page.upload("#picture", tmp_path / "picture.png")
    page.press("Tokenize")
    page.wait("figures", lambda: "6 tokens at 16 px" in page.read("#figures textarea, #figures input"))
    page.wait("comparison", lambda: page.picture_sizes("#comparison img") == [[16, 16]] * 2)
    ids = page.read("#token-ids textarea").split()
    assert len(ids) == 6

    page.write("#num-tokens input[type=number]", "2")
    page.press("Tokenize")
    page.wait("figures", lambda: "2 tokens at 16 px" in page.read("#figures textarea, #figures input"))
    assert page.read("#token-ids textarea").split() == ids[:2]
