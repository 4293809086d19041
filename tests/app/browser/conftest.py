"""Chromium and the web app for the tests of this folder: what a visitor types, sees and gets."""

import base64
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.app.conftest import WAIT, AppProcess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-color-profile=srgb"
)
DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
PIXELS = """image => {
    const canvas = Object.assign(document.createElement('canvas'),
                                 {width: image.naturalWidth, height: image.naturalHeight});
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let text = '';
    for (let place = 0; place < data.length; place += 8192)
        text += String.fromCharCode(...data.subarray(place, place + 8192));
    return [canvas.width, canvas.height, btoa(text)];
}"""
MARK = "status => status.querySelectorAll('*').forEach(one => one.dataset.before = 'yes')"
NEWLY = """text => [...document.querySelectorAll('#status *:not([data-before])')]
    .some(one => one.innerText.includes(text) && !one.querySelector('[data-before]'))"""
DROP = """(zone, [content, name]) => {
    const bytes = Uint8Array.from(atob(content), one => one.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name, {type: 'image/png'}));
    for (const kind of ['dragenter', 'dragover', 'drop'])
        zone.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: carried}));
}"""


class Visitor:
    """Somebody at the page: a browser profile of its own with one page open.

    Args:
        browser: of playwright.
        url: of the app.
        size: of the window, in pixels.

    Attributes:
        page: of playwright.
        complaints: what the browser's console and network had to complain about.
    """

    def __init__(self, browser: Any, url: str, size: dict[str, int] = DESKTOP) -> None:
        self.url, self.complaints = url, []
        self.context = browser.new_context(viewport=size, accept_downloads=True)
        self.context.set_default_timeout(WAIT * 1000)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self._complain(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self._complain(str(error)))
        self.context.on("request", self._watch)
        self.page.goto(url)

    def _complain(self, what: str) -> None:
        self.complaints.append(what)

    def _watch(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self._complain(f"asked {request.url}")

    def find(self, name: str) -> Any:
        """Returns the part of the page with an elem_id, once it is there."""
        part = self.page.locator(f"#{name}")
        part.wait_for(state="attached")
        return part

    def text(self, name: str) -> str:
        """Returns what stands in a part of the page."""
        return self.find(name).inner_text().strip()

    def unfold(self) -> None:
        """Opens everything that is folded."""
        for name, inside in (("advanced", "steps"), ("restore-box", "restore")):
            if not self.page.locator(f"#{inside}").is_visible():
                self.find(name).locator("button").first.click()
                self.page.locator(f"#{inside}").wait_for()

    def type(self, name: str, value: Any) -> None:
        """Types into a field and leaves it, as the tab key does."""
        field = self.find(name).locator("textarea, input[type=number], input[type=text]").first
        field.fill(str(value))
        field.press("Tab")

    def value(self, name: str) -> str:
        """Returns what stands in a field."""
        return str(self.find(name).locator("textarea, input[type=number], input[type=text]").first.input_value())

    def choose(self, name: str, label: str) -> None:
        """Clicks at one of several choices."""
        self.find(name).get_by_text(label, exact=True).click()

    def randomise(self, on: bool) -> None:
        """Sets or clears the box of a new seed."""
        self.find("randomise").locator("input").set_checked(on)

    def ask(self, prompt: str, *, steps: int = 2, seed: int | None = 0, number: int = 1) -> None:
        """Fills the fields and presses the button."""
        self.unfold()
        self.type("prompt", prompt)
        self.type("steps", steps)
        self.type("number", number)
        self.randomise(seed is None)
        if seed is not None:
            self.type("seed", seed)
        self.generate()

    def generate(self) -> None:
        """Presses the button; what the status says from before is marked, so that nobody takes it for the answer."""
        self.find("status").evaluate(MARK)
        self.press("generate")

    def press(self, name: str) -> None:
        """Presses a button, once it can be pressed."""
        self.find(name).click()

    def until(self, name: str, text: str) -> str:
        """Waits until a part of the page says something; returns all that it says."""
        self.page.wait_for_function(
            "([name, text]) => (document.getElementById(name)?.innerText || '').includes(text)", arg=[name, text]
        )
        return self.text(name)

    def until_value(self, name: str, value: str) -> None:
        """Waits until a field holds something."""
        self.page.wait_for_function(
            "([name, value]) => [...document.querySelectorAll(`#${name} textarea, #${name} input`)]"
            ".some(field => field.value === value)",
            arg=[name, value],
        )

    def until_made(self, number: int = 1) -> list[np.ndarray]:
        """Waits for the end of a wish; returns the pixels (H, W, 3) of its pictures, as the browser shows them."""
        self.page.wait_for_function(NEWLY, arg=f"{number} picture{'s' if number > 1 else ''} in ")
        return self.pictures()

    def pictures(self) -> list[np.ndarray]:
        """Returns the pixels of the pictures that are shown, each once."""
        found: dict[str, np.ndarray] = {}
        for image in self.find("gallery").locator("img").all():
            source = image.get_attribute("src")
            if source in found:
                continue
            image.evaluate("image => image.decode()")
            width, height, content = image.evaluate(PIXELS)
            pixels = np.frombuffer(base64.b64decode(content), dtype=np.uint8).reshape(height, width, 4)
            assert (pixels[..., 3] == 255).all()
            found[source] = pixels[..., :3]
        return list(found.values())

    def drop(self, name: str, content: bytes, file: str) -> None:
        """Drops a file onto a part of the page."""
        zone = self.find(name).locator("button").first
        zone.evaluate(DROP, [base64.b64encode(content).decode(), file])

    def overflow(self) -> int:
        """Returns how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def close(self) -> None:
        """Closes the browser profile."""
        self.context.close()


def find_chromium() -> str:
    """Returns the path of Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of the module, since playwright keeps an event loop running, which other tests may not expect."""
    pytest.importorskip("gradio", reason="needs: pip install 'sana-python[gradio]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    path = find_chromium()
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=path, args=FLAGS.split())
        yield made
        made.close()


@pytest.fixture(scope="session")
def site() -> Iterator[AppProcess]:
    """The app with the bundled model and the list of words."""
    find_chromium()
    app = AppProcess("--device=cpu", "--safety=basic")
    yield app
    app.end()


@pytest.fixture
def visitor(browser: Any, site: AppProcess) -> Iterator[Visitor]:
    """Somebody new at the page; afterwards the browser must not have complained about anything."""
    made = Visitor(browser, site.url)
    yield made
    made.close()
    assert made.complaints == []
