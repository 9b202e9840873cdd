"""One browser for the tests of a module, and a page in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.browser import CHROMIUM

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.report_page import Visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    assert shutil.which(CHROMIUM) or Path(CHROMIUM).exists()
    from playwright.sync_api import sync_playwright

    from support.report_page import PATIENCE

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    from support.report_page import Visit

    made = Visit(browser)
    yield made
    made.page.close()
