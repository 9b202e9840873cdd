"""A report's page in a real browser, and what it complained of."""

from __future__ import annotations

import time
from pathlib import Path

from playwright.sync_api import Browser, Error, Page

PATIENCE = 120_000
"""Milliseconds; a limit for a hung browser on a busy machine, not a measurement."""


class Visit:
    """A page with what it complained of and asked for."""

    def __init__(self, browser: Browser, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))

    def open(self, file: Path, fragment: str = "") -> Page:
        self.page.goto("about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.page.goto(file.as_uri() + fragment)
        self.page.evaluate("sapoReport.tokens.ready")
        return self.page


def wait(page: Page, expression: str) -> None:
    """Until it is true; a page that reloads meanwhile has no answer. (Playwright's own way needs eval.)"""
    deadline = time.monotonic() + PATIENCE / 1000
    while True:
        try:
            if page.evaluate(expression):
                return
        except Error:
            pass
        assert time.monotonic() < deadline, f"never true: {expression}"
        page.wait_for_timeout(50)


def texts(page: Page, selector: str) -> list[str]:
    return page.eval_on_selector_all(selector, "found => found.map((e) => e.textContent)")
