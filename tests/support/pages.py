"""The pages of the documentation as tests read them: blocks of code, and the marks that stand before them.

Marks are HTML comments on a line of their own, at most one blank line before a fenced block:

    <!-- file: my_rewards.py -->     the block is the content of a file beside which the page's commands run
    <!-- small: quickstart -->       the block's commands get the settings of that name in `SMALL`
    <!-- skip: REASON -->            the block is not run; the reason says what runs it instead, or why nothing can
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=fence)[ \t]*$", re.M | re.S
)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:    [^\n]*\n|\n)*    [^\n]*\n?")
MARK = re.compile(r"<!-- (\w+): (.*?) -->")
MARKS = ("file", "small", "skip")


@dataclass(frozen=True)
class Block:
    """One block of code.

    >>> page = "<!-- small: quickstart -->\\n\\n```bash\\nsapo doctor\\n```\\n"
    >>> [(b.language, b.text, b.marks) for b in blocks(page)]
    [('bash', 'sapo doctor\\n', {'small': 'quickstart'})]
    """

    language: str
    """"" of an indented block."""
    text: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page in order: fenced ones with their marks, and indented ones without."""
    found = []
    for match in FENCE.finditer(page):
        before = page[: match.start()].rstrip().rsplit("\n", 1)[-1].strip()
        marks = dict(MARK.findall(before)) if before.startswith("<!--") else {}
        text = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        found.append(Block(match["language"], text, page[: match.start()].count("\n") + 2, marks))
    rest = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page)
    for match in INDENTED.finditer(rest):
        text = re.sub(r"^    ", "", match[0].strip("\n") + "\n", flags=re.M)
        found.append(Block("", text, rest[: match.start()].count("\n") + 1))
    return sorted(found, key=lambda block: block.line)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the `sapo` commands of a text as lists of arguments, without `sapo`; comments are left out.

    >>> list(commands("sapo train quickstart 'prompt.stop=[1]'  # now\\nmake test\\n"))
    [['train', 'quickstart', 'prompt.stop=[1]']]
    """
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("sapo "):
            yield shlex.split(line, comments=True)[1:]


def pages() -> list[Path]:
    """Return the pages for readers: README.md and all of docs/ but its decisions."""
    return [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "adr" not in p.parts)]
