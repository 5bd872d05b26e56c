"""A headless Chromium that reaches this machine alone, and what it did while a page was open."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = (
    "Chromium is missing, which the console's tests drive: install it (Debian: apt-get install chromium), or leave "
    "these tests out: make test ARGS='-m \"not browser\"'"
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip


def chromium() -> str:
    """Its program; without it the test fails and says what to do."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(MISSING, pytrace=False)
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Not for a whole session: while it is open, this thread counts as one with a running event loop."""
    program = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page, and what it should not have done.

    Attributes:
        errors: messages of its console, and exceptions.
        requests: addresses that it asked for.
        streams: bodies of its chat requests, and what came back.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    streams: list[tuple[dict[str, Any], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", self._take)

    def _take(self, response: Any) -> None:
        if response.url.endswith("/chat/completions"):
            self.streams.append((response.request.post_data_json, response))

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def tab_to(self, element_id: str, most: int = 60) -> None:
        """Press the tabulator until this element has the focus."""
        for _ in range(most):
            if self.page.evaluate("document.activeElement.id") == element_id:
                return
            self.press("Tab")
        raise AssertionError(f"the tabulator doesn't reach {element_id}")


def accessibility(page: Page) -> str:
    """What axe finds wrong; empty: nothing."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    return found.generate_report() if found.violations_count else ""
