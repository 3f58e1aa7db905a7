"""Headless Chromium for the page's tests: found, started once, watched for errors and requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def executable() -> str:
    """The browser's path: EVENKEEL_CHROMIUM, or one on the path.

    Without one the test is skipped, but in continuous integration it fails.
    """
    wanted = os.environ.get("EVENKEEL_CHROMIUM")
    found = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return found
    reason = (
        f"EVENKEEL_CHROMIUM is '{wanted}', which cannot be run"
        if wanted
        else f"no browser: none of {', '.join(NAMES)} is installed, and EVENKEEL_CHROMIUM not set"
    )
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Watched:
    """A page in the browser, with what it said and what it asked the network for."""

    page: Page
    address: str
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def quiet(self) -> bool:
        """True if nothing was said, and nothing asked for but the file itself."""
        return not self.said and set(self.asked) <= {self.address}


@contextmanager
def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Watched]:
    """The file in a fresh context, figures drawn; options are of ``Browser.new_context``."""
    options = {"viewport": {"width": 1280, "height": 900}, **context}
    with browser.new_context(**options) as made:
        page = made.new_page()
        page.set_default_timeout(15_000)
        watched = Watched(page, path.as_uri())
        page.on("console", lambda message: watched.said.append(message.text))
        page.on("pageerror", lambda error: watched.said.append(str(error)))
        page.on("request", lambda request: watched.asked.append(request.url))
        page.goto(watched.address, wait_until="load")
        yield watched
