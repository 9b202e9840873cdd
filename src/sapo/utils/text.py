"""Text that a model or a file wrote, made safe to look at: what would steer a terminal or reorder a line is spelled
out.

A terminal obeys escape sequences, a carriage return overwrites a line, and marks of direction show text in another
order than it stands in (https://trojansource.codes). Markup is no matter of this module: pages put text into text
nodes.
"""

from __future__ import annotations

import re
from pathlib import Path

# C0 but tab and newline, DEL and C1; soft hyphen; marks, embeddings, overrides and isolates of direction; zero widths,
# separators of lines and paragraphs; fillers; the byte order mark; halves of surrogate pairs; tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return the text with escapes in place of characters that steer a terminal; tab and newline stay.

    >>> visible("a\x1b[2Jb\u202ec\r\n")
    'a\\x1b[2Jb\\u202ec\\x0d\n'
    """
    return _HIDDEN.sub(lambda found: _escape(ord(found[0])), text)


def visible_line(text: str) -> str:
    r"""Return `visible` text on one line, for a name: runs of blanks and line ends become a space.

    >>> visible_line("tool a:\n turn 9\x1b")
    'tool a: turn 9\\x1b'
    """
    return " ".join(visible(text).split())


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for a message of ours that quotes it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def name_error(error: BaseException) -> str:
    """Return the class and the text of what a user's code raised; the class alone where its text cannot be had.

    >>> name_error(KeyError("board"))
    "KeyError: 'board'"
    """
    try:
        return f"{type(error).__name__}: {error}"
    except (Exception, SystemExit):  # its __str__ is the user's too
        return type(error).__name__


def last_words(log: Path) -> str:
    """Say what a log ends with, for a message about a process that has ended."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return f"{log} ends with: {lines[-1].strip()}" if lines else f"{log} is empty"
