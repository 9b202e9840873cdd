"""The display of a run in a notebook: one block of HTML that is drawn anew, with the lines of a terminal below it."""

from __future__ import annotations

import html
import io
from typing import Any

from rich.console import Console

from sapo.front.display import Display
from sapo.front.lines import duration
from sapo.utils.text import visible

LINES = 12
"""Lines of the log that the block shows."""


class NotebookDisplay(Display):
    """Shows a run in the output of a notebook's cell: bar, figures of the newest step, last lines of the log."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), force_terminal=True, width=200, emoji=False))
        self.lines: list[str] = []
        self._at: tuple[str, int, int | None, str, str] | None = None
        self._handle: Any = None

    def say(self, text: str) -> None:
        """Add a line to the block, and draw it."""
        self.lines.append(visible(text))
        self._draw()

    def warning(self, text: str) -> None:
        """Add a warning to the block."""
        self.say(f"warning: {text}")

    def stop(self) -> None:
        """Draw the block for the last time."""
        if self._handle is not None:
            self._draw()

    def _show(self, description: str, completed: int, total: int | None, figures: str, phase: str = "") -> None:
        self._at = (description, completed, total, figures, phase)
        self._draw()

    def to_html(self) -> str:
        """Return the block."""
        parts = []
        if self._at is not None:
            description, completed, total, figures, phase = self._at
            bar = f'<progress value="{completed}" max="{total or max(completed, 1)}" style="width:24em"></progress>'
            left = self._left(completed, total)
            count = f"{completed}/{total}" if total else str(completed)
            parts.append(f"<div>{html.escape(description)} {bar} {count}{left} {html.escape(phase)}</div>")
            parts.append(f"<div><code>{html.escape(figures)}</code></div>")
        shown = "\n".join(html.escape(line) for line in self.lines[-LINES:])
        parts.append(f'<pre style="white-space:pre-wrap;max-height:18em;overflow:auto">{shown}</pre>')
        return "".join(parts)

    def _left(self, completed: int, total: int | None) -> str:
        if self._began is None or total is None:
            return ""
        began, before = self._began
        done = completed - before
        left = (self._clock() - began) / done * (total - completed) if done > 0 else 0.0
        return f", {duration(left)} left" if left > 0 else ""

    def _draw(self) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(self.to_html()), display_id=True)
        else:
            self._handle.update(HTML(self.to_html()))
