"""Choose how a run's progress is shown: in a notebook, on a terminal, or as plain lines."""

from __future__ import annotations

import sys

from rich.console import Console

from sapo.front.display import Display
from sapo.front.notebook import NotebookDisplay


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows HTML."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


def make_display() -> Display:
    """Return the display for where this process prints."""
    return NotebookDisplay() if in_notebook() else Display(Console(emoji=False))
