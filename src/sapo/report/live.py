"""A report that is written again while its runs go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sapo.report.assemble import RunReport, make_report
from sapo.report.page import write_page
from sapo.report.runs import find_runs

LOOK_EVERY = 1.0
"""Seconds between looks at the runs' files."""

RELOAD_EVERY = 10.0
"""Seconds between the page's own reloads."""

REST = 4.0
"""Rest after a report, in multiples of the time it took: a report takes at most a fifth of a core."""


def watch(
    paths: Sequence[Path],
    out: Path,
    *,
    tokens: int | None,
    should_stop: Callable[[], bool],
    on_report: Callable[[RunReport], None] = lambda _: None,
    wait: Callable[[float], None] = time.sleep,
    reload_every: float = RELOAD_EVERY,
) -> RunReport:
    """Write the page whenever there is something new, until every run has ended or a stop is asked for.

    The last page does not reload itself: a browser that loads it stops reloading.

    Args:
        on_report: called with every report that was written.
        wait: sleeps for so many seconds.

    Raises:
        ConfigError: as `make_report` and `write_page`.
    """
    seen = None
    while True:
        now = fingerprint(paths)
        took = 0.0
        if now != seen:
            started = time.monotonic()
            report = make_report(paths, tokens=tokens)
            over = report.finished or should_stop()
            write_page(report, out, reload_every=None if over else reload_every)
            on_report(report)
            if over:
                return report
            seen, took = now, time.monotonic() - started
        rest = max(LOOK_EVERY, REST * took)
        while rest > 0 and not should_stop():
            wait(min(LOOK_EVERY, rest))
            rest -= LOOK_EVERY
        if should_stop():
            report = make_report(paths, tokens=tokens)
            write_page(report, out)
            on_report(report)
            return report


def fingerprint(paths: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a run writes: size and time of its metrics, summary, failure and rollouts.

    Raises:
        ConfigError: as `find_runs`.
    """
    found = []
    for run in find_runs(paths):
        for file in (run / "metrics.jsonl", run / "summary.json", run / "failure.json", run / "rollouts"):
            try:
                status = file.stat()
            except OSError:
                continue
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(found)
