"""A person at the page: headless Chromium, one tab after another, and the fixtures that open them."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest

from tests.builders.tiny import red_picture

ROOT = Path(__file__).parents[2]
# Besides running without a window: nothing that would make the browser itself talk to other computers.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 400, "height": 860}


@pytest.fixture(scope="module")
def browser(browser_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tiny_checkpoint):
    """A page in this process, so that its threads can be looked at; its model never ends an answer by itself."""
    from demo.app import serving

    with serving(tiny_checkpoint, port=free_port()) as page:
        yield page


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Page:
    """One tab, and what a person does in it."""

    def __init__(self, tab, address):
        from playwright.sync_api import expect

        self.tab, self.expect = tab, expect
        self.requests: list[str] = []
        self.problems: list[str] = []
        tab.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("pageerror", lambda error: self.problems.append(str(error)))
        tab.goto(address)
        self.typed = tab.get_by_label("Your question")
        self.typed.wait_for()
        self.chat = tab.get_by_role("log")
        self.answers = tab.locator("#chat .message.bot:not(:has(.thinking))")
        self.questions = tab.locator("#chat .message.user:not(:has(.pictures))")
        self.pictures = tab.locator("#chat .pictures img")
        self.attached = tab.locator("#composer .thumbnail-item, #composer .thumbnail-small")
        self.notice = tab.get_by_role("alert")
        self.seen = tab.locator(".figures img")
        self.prompt = tab.get_by_label("The exact prompt")

    def button(self, name):
        return self.tab.get_by_role("button", name=name, exact=True)

    def attach(self, *files):
        count = self.attached.count()
        self.tab.set_input_files("#composer input[type=file]", [str(file) for file in files])
        self.expect(self.attached).to_have_count(count + len(files))

    def ask(self, text, *files):
        if files:
            self.attach(*files)
        self.typed.fill(text)
        self.typed.press("Enter")

    def set(self, **settings):
        """Sliders by the first words of their names, `longest_answer=8`."""
        if not self.tab.get_by_label("Seed").is_visible():
            self.button("How it answers").click()
        for name, value in settings.items():
            field = self.tab.get_by_role("spinbutton", name=re.compile(name.replace("_", " "), re.IGNORECASE))
            field.fill(str(value))
            field.press("Enter")

    def wait_for_words(self, number=1):
        self.expect(self.answers).to_have_count(number)
        self.expect(self.answers.last).to_have_text(re.compile(r"\S"))

    def wait_for_end(self, number=1):
        """Until so many answers are there and the last one is done; the untrained model ends none by itself."""
        self.expect(self.answers).to_have_count(number)
        self.expect(self.answers.last).to_contain_text(re.compile("cut off|stopped|No answer"))
        self.expect(self.button("Submit")).to_be_visible()


@pytest.fixture
def open_page(browser):
    """Opens tabs, each in a browser profile of its own."""
    contexts = []

    def open_page(address, **options):
        contexts.append(browser.new_context(**{"viewport": WIDE, **options}))
        return Page(contexts[-1].new_page(), address)

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page, served):
    page = open_page(served.address)
    yield page
    assert not page.problems


@pytest.fixture
def picture(tmp_path):
    return red_picture(tmp_path / "red.png", 90, 60)


@pytest.fixture
def slowly(served):
    """The model takes its time, so that there is something to stop on any machine: 2048 tokens in a minute or more."""
    brake = served.engine.model.register_forward_hook(lambda *_: time.sleep(0.03))
    yield
    brake.remove()


def wait_until(is_true, seconds=30):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
