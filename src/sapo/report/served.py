"""The report served while its runs go on: one page that takes news in place (`sapo watch`).

Two things change at different speeds. What each run is doing (live.json, the last line of its metrics) is small and is
sent several times a second; the report is made anew when the runs' files have changed and a rest is over, and the page
asks for it when it is told. Nothing is written, and no request changes anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sapo.diagnostics.titles import metric_title, shown_figures
from sapo.errors import ConfigError
from sapo.report.assemble import RunReport, make_report
from sapo.report.live import REST, fingerprint
from sapo.report.page import page_text
from sapo.report.runs import find_runs, has_finished, read_lines
from sapo.run.live import LIVE_FILE
from sapo.utils.reading import read_json, read_yaml
from sapo.utils.text import first_line, visible

LOOK_EVERY = 0.5
"""Seconds between two looks at what the runs are doing."""
SEND_EVERY = 0.25
"""Seconds between two looks at whether there is something to send."""
SHOWN = ("reward/mean", "pass@1", "update/entropy", "update/gate/eur", "length/mean")
"""Metrics of the last step that are shown while a run goes on."""
STALE_AFTER = 1800.0
"""Seconds without a new phase after which a run on another machine counts as gone."""
KEPT = 8
"""Reports whose tokens a page may still ask for: one that is paused keeps an older report than the newest."""
LASTING = 5.0
"""Seconds for which the runs must not be readable before it is said: a file that is being written is whole sooner."""
TAIL = 2**16
"""Bytes at the end of metrics.jsonl that are read for its last step."""


def refusal(status: int, message: str) -> Response:
    """Return an error as a line of text."""
    return PlainTextResponse(f"{message}\n", status)


class Watch:
    """Looks at runs from a thread of its own, and has the newest of what there is to show.

    Args:
        paths: of runs, of comparisons, or of directories with runs in them.
        tokens: as `make_report`.
        on_trouble: called with a sentence when the runs could not be read for LASTING seconds, once for each time, and
            when they can be read again. Pages show the first as well.

    Raises:
        ConfigError: as `make_report`.
    """

    def __init__(
        self, paths: Sequence[Path], tokens: int | None, on_trouble: Callable[[str], None] = lambda text: None
    ) -> None:
        self.paths, self.tokens, self.on_trouble = paths, tokens, on_trouble
        self._seen = fingerprint(paths)
        # Milliseconds: a server that took this one's place does not give its numbers again to other reports.
        self._chunks: dict[int, list[str]] = {}
        self._take(time.time_ns() // 10**6, make_report(paths, tokens=tokens))
        self.trouble: str | None = None
        """Why there is nothing newer to show; None while all is well."""
        self.news = self._look()
        self.news_version = 1
        self._failing: dict[str, float] = {}
        """Since when a part of the reading fails."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sapo-watch", daemon=True)

    @property
    def newest(self) -> tuple[int, RunReport]:
        """Return the newest report and its version, which belong together."""
        return self._newest

    @property
    def version(self) -> int:
        """Return the version of the newest report."""
        return self._newest[0]

    @property
    def report(self) -> RunReport:
        """Return the newest report."""
        return self._newest[1]

    def chunk(self, version: int, place: int) -> str | None:
        """Return the packed tokens of a step as a report has them; None where that report is kept no more."""
        chunks = self._chunks.get(version, [])
        return chunks[place] if place < len(chunks) else None

    def _take(self, version: int, made: RunReport) -> None:
        """Take a new report, and forget the tokens of the oldest."""
        same = {data: data for chunks in self._chunks.values() for data in chunks}  # most steps are as they were
        kept = {**self._chunks, version: [same.get(chunk.data, chunk.data) for chunk in made.tokens.chunks]}
        self._chunks = dict(list(kept.items())[-KEPT:])
        self._newest = (version, made)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    @property
    def stopping(self) -> bool:
        """Tell whether the watch is over."""
        return self._stop.is_set()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        next_report = 0.0
        while not self._stop.wait(LOOK_EVERY):
            try:
                looked = self._attempt("look", lambda: self._publish(self._look()))
                if looked and (started := time.monotonic()) >= next_report:
                    self._attempt("renewal", self._renew)  # one that fails rests as well
                    next_report = time.monotonic() + REST * (time.monotonic() - started)
                if not self._failing:
                    self._report_trouble(None)
            except Exception:
                self._report_trouble(
                    "a fault of sapo has ended the watch; the terminal has its traceback; start `sapo watch` again"
                )
                raise

    def _attempt(self, part: str, read: Callable[[], None]) -> bool:
        """Read the runs; return whether they could be read. A trouble is reported when the part fails again LASTING
        seconds after its first failure, and has not succeeded since."""
        try:
            read()
        except (ConfigError, OSError) as error:
            # A file is being written, or a run was moved away: the next look may be better.
            since = self._failing.setdefault(part, time.monotonic())
            if time.monotonic() - since >= LASTING and self.trouble is None:
                self._report_trouble(f"the runs cannot be read: {first_line(error)}; what is shown is older")
            return False
        self._failing.pop(part, None)
        return True

    def _renew(self) -> None:
        """Make the report anew where the runs have written something."""
        if (now := fingerprint(self.paths)) != self._seen:
            self._take(self.version + 1, make_report(self.paths, tokens=self.tokens))
            self._seen = now

    def _report_trouble(self, trouble: str | None) -> None:
        """Report a problem, or that it is over, once."""
        shown = None if trouble is None else visible(trouble)
        if shown == self.trouble:
            return
        self.trouble = shown
        self._publish({**self.news, "trouble": shown})
        self.on_trouble("the runs can be read again" if shown is None else shown)

    def _publish(self, news: dict[str, Any]) -> None:
        """Give pages the news where they differ from the last."""
        if _without_clock(news) != _without_clock(self.news):
            self.news, self.news_version = news, self.news_version + 1

    def _look(self) -> dict[str, Any]:
        runs = find_runs(self.paths)
        names = [run.resolve().name for run in runs]
        clear = len(set(names)) == len(names)
        return {
            "now": time.time(),
            "trouble": self.trouble,
            "runs": [run_state(run, name if clear else str(run)) for run, name in zip(runs, names, strict=True)],
        }


def _without_clock(news: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in news.items() if key != "now"}


def run_state(run: Path, name: str) -> dict[str, Any]:
    """Return what a run is doing: its state, steps, the last step's figures and its live.json.

    Texts have control characters spelled out. A run that was killed leaves a live.json: on this machine its process has
    gone, on another its age tells.
    """
    settings = read_yaml(run / "config.yaml", quick=True)
    planned = (settings.get("train") or {}).get("steps")
    last = _last_step(run / "metrics.jsonl")
    live, summary, failure = (_json_or_none(run / file) for file in (LIVE_FILE, "summary.json", "failure.json"))
    steps = int(last.get("step", 0))
    done = has_finished(settings, summary, steps)
    running = live is not None and _lives(live)
    state = "running" if running else "done" if done else "failed" if failure else "stopped"
    reason = failure.get("reason") if state == "failed" and failure else None
    return {
        "name": visible(name),
        "state": state,
        "steps": steps,
        "planned": planned,
        "reason": None if reason is None else visible(str(reason)),
        "figures": [(metric_title("step", key).title, last[key]) for key in shown_figures(last, SHOWN)],
        "live": _shown(live) if running and live is not None else None,
    }


def _shown(live: dict[str, Any]) -> dict[str, Any]:
    samples = [
        {
            **row,
            "prompt": visible(str(row["prompt"])),
            "text": visible(str(row["text"])),
            "transcript": [[visible(str(part)) for part in said] for said in row.get("transcript", ())],
        }
        for row in live.get("samples", [])
    ]
    return {**live, "samples": samples}


def _lives(live: dict[str, Any]) -> bool:
    """Tell whether the process that wrote a live.json goes on."""
    try:
        if live["host"] != socket.gethostname():
            return bool(time.time() - live["since"] < STALE_AFTER)
        # Another process may have its number by now, and began at another time.
        return bool(abs(psutil.Process(live["pid"]).create_time() - live["started"]) < 5)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _json_or_none(file: Path) -> dict[str, Any] | None:
    try:
        value = read_json(file, "a run's state")
    except (ConfigError, OSError):
        return None
    return value if isinstance(value, dict) else None


def _last_step(file: Path) -> dict[str, Any]:
    """Return the last step's record, from the end of a file that may be long; empty where there is none."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - TAIL))
            lines = opened.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines[1:] if size > TAIL else lines):
        try:
            record = json.loads(line)
        except ValueError:  # being written
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            return record
    steps = [r for r in read_lines(file) if r.get("kind") == "step"] if size > TAIL else []
    return steps[-1] if steps else {}


def application(watch: Watch) -> Starlette:
    """Make the application of a watch: the page, its events, the newest report and its tokens."""

    async def page(request: Request) -> Response:
        version, found = watch.newest
        text = await asyncio.to_thread(page_text, found, {"served": version}, served=True)
        return Response(text, media_type="text/html", headers={"Cache-Control": "no-store"})

    async def report(request: Request) -> Response:
        version, found = watch.newest
        return _json({**found.to_json(), "served": version})

    async def chunk(request: Request) -> Response:
        # A page asks by the report it has, in which each step has its own place.
        data = watch.chunk(request.path_params["version"], request.path_params["place"])
        return refusal(404, "the report has changed since") if data is None else PlainTextResponse(data)

    async def events(request: Request) -> Response:
        known = request.query_params.get("report", "")
        return StreamingResponse(
            _events(watch, int(known) if known.isdecimal() else 0),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    async def nothing(request: Request) -> Response:
        return Response(status_code=204)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/report.json", report),
            Route("/events", events),
            Route("/chunks/{version:int}/{place:int}", chunk),
            Route("/favicon.ico", nothing),
        ]
    )


async def _events(watch: Watch, report: int) -> AsyncIterator[str]:
    """Yield news as they come, and a comment every so often, without which a lost client is never noticed."""
    news, quiet = 0, 0.0
    while not watch.stopping:
        if news != watch.news_version:
            news, quiet = watch.news_version, 0.0
            yield _event("live", {**watch.news, "now": time.time()})
        if report != watch.version:
            report, quiet = watch.version, 0.0
            yield _event("report", report)
        if quiet > 15:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(SEND_EVERY)
        quiet += SEND_EVERY


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json", headers={"Cache-Control": "no-store"})
