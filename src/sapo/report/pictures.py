"""Pictures of logged completions, as the run's directory keeps them by hash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sapo.data import Picture
from sapo.data.thumbnails import Thumbnails
from sapo.report.runs import ReportedRun


def add_thumbnails(thumbnails: Thumbnails, run: ReportedRun, rows: Iterable[dict[str, Any]]) -> None:
    """Take in the pictures that rows of rollouts/ show, where the run kept them."""
    for row in rows:
        for sha256 in row.get("pictures", ()):
            thumbnails.add(sha256, lambda sha256=sha256: kept_picture(run.path, sha256))  # type: ignore[misc]


def kept_picture(run: Path, sha256: str) -> Picture | None:
    """Return a picture that a run kept, None where it did not."""
    if not sha256.isalnum():
        return None
    file = next(iter((run / "pictures").glob(f"{sha256}.*")), None)
    return None if file is None else Picture(sha256, (0, 0), path=str(file))
