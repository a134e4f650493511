"""A headless browser for the tests of web pages."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

SCREEN = ViewportSize(width=1920, height=1080)
TIMEOUT_MS = 60_000  # the machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("no 'chromium' on PATH; install it (Debian: apt-get install chromium)", pytrace=False)
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not run as root
        yield playwright.chromium.launch(executable_path=chromium, args=sandbox)


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """An empty page; a screenshot at the end of the test goes to tmp_path / "end.png"."""
    with browser.new_context(viewport=SCREEN) as context:
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        yield page
        page.screenshot(path=tmp_path / "end.png", full_page=True)


@pytest.fixture
def console(page: Page) -> Iterator[list[str]]:
    """The errors in the browser's console, violations of the Content-Security-Policy among them: none at the end."""
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield errors
    assert errors == []
