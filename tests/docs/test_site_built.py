"""The site as it is built and opened: no warning, nothing from elsewhere, one search, fit for a phone."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from support.browser import CHROMIUM, MISSING, Browser
from support.pages import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make test-docs` has it")
pytestmark = pytest.mark.docs

OPENED = ("", "start/laptop/", "howto/my-reward/", "explanation/method-in-pictures/", "coming-from/trl/", "features/")
OPENED += ("troubleshooting/", "reference/", "commands/", "python/", "metrics/", "repository/research/evidence/")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; mkdocs ends with an error where it has a warning."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # the theme's advertisement, as in the Makefile
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site behind a server on loopback: its search asks for a file, which no page from the disk may do."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe|source)[^>]+(?:src|href)=[\"']?(https?://[^\"' >]+)")
    found = {
        (page.relative_to(site).as_posix(), url)
        for page in site.rglob("*.html")
        for tag, url in ((m[0], m[1]) for m in loaded.finditer(page.read_text(encoding="utf-8")))
        if 'rel="canonical"' not in tag
    }
    assert found == set()


def test_every_link_within_the_site_leads_to_a_file(site: Path) -> None:
    broken = []
    for page in site.rglob("index.html"):
        for link in re.findall(r'href="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|//", link) and link != ".":
                target = (page.parent / link).resolve()
                if not (target.exists() or (target / "index.html").exists()):
                    broken.append((page.relative_to(site).as_posix(), link))
    assert broken == []


def test_one_search_finds_keys_metrics_commands_questions_and_decisions(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    text = " ".join(entry["title"] + " " + entry["text"] for entry in entries)
    for word in ("train.tokens_per_microbatch", "groups/zero_variance", "sapo eval-compare", "clip ratio is always 0"):
        assert word in text, word
    assert any(entry["location"].startswith("adr/") for entry in entries)
    assert any(entry["location"].startswith("repository/research/log") for entry in entries)


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_pages_open_without_an_error_and_fit_the_window(address: str, tmp_path: Path, width: int, scheme: str) -> None:
    """A new browser for each: the theme remembers the colours of the first visit."""
    browser = Browser(tmp_path / "profile", (width, 900))
    narrow = width < 600
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=narrow)
    browser.prefer(scheme)
    try:
        for page in OPENED:
            browser.open(address + page)
            browser.wait("document.readyState === 'complete'")
            assert browser.run("document.documentElement.scrollWidth") <= width, page
            colours = browser.run("document.body.getAttribute('data-md-color-scheme')")
            assert colours == {"light": "default", "dark": "slate"}[scheme], page
            assert errors_of(browser, address) == [], page
    finally:
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_search_of_the_page_answers(address: str, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile", (1440, 900))
    try:
        browser.open(address + "?q=overlong_buffer")
        browser.wait("document.querySelectorAll('.md-search-result__item').length > 0")
        assert "overlong" in browser.run("document.querySelector('.md-search-result__list').innerText")
    finally:
        browser.close()


def errors_of(browser: Browser, address: str) -> list[str]:
    """Return the errors of the console, failed requests, and requests to elsewhere."""
    found = []
    for event in browser.events:
        kind, what = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and what["entry"]["level"] == "error"):
            found.append(json.dumps(what)[:300])
        elif kind == "Network.requestWillBeSent" and what["request"]["url"].startswith("http"):
            if not what["request"]["url"].startswith(address):
                found.append(what["request"]["url"])
        elif kind == "Network.responseReceived" and what["response"]["status"] >= 400:
            found.append(f"{what['response']['status']} {what['response']['url']}")
    return found
