"""The pages of the documentation as tests read them: blocks of code, and the marks that stand before them.

Marks are HTML comments on a line of their own, at most one blank line before a fenced or indented block:

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
FOR_NEWCOMERS = ("start", "howto", "explanation", "coming-from")
GUIDES = ("engines", "environments", "objectives", "python-guide", "report", "serving", "usage", "verifiers")
FOLLOWED = {
    "README.md": ROOT / "README.md",
    **{str(p.relative_to(ROOT)): p for part in FOR_NEWCOMERS for p in sorted((DOCS / part).glob("*.md"))},
    **{f"docs/{name}.md": DOCS / f"{name}.md" for name in GUIDES},
}
"""Pages whose blocks are run, in order."""
MADE = ("docs/commands.md", "docs/reference.md")
"""Pages made from the code."""

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

    @property
    def kind(self) -> str:
        """Return what a reader does with it: `python` and `bash` are run, all else is read.

        >>> [Block("", text, 1).kind for text in ("sapo doctor\\n", "import sapo\\n", "tasks:\\n", "git clone x\\n")]
        ['bash', 'python', '', 'bash']
        """
        if self.language:
            return self.language
        if re.search(r"^(sapo|make|pip|git|wandb|(\S*/)?python3?) (?!\|)", self.text, re.M):
            return "bash"
        return "python" if re.match(r"(import|from) \w", self.text) else ""


def marks_before(page: str, start: int) -> dict[str, str]:
    """Return the marks on the last line of text before a place of a page."""
    before = page[:start].rstrip().rsplit("\n", 1)[-1].strip()
    return dict(MARK.findall(before)) if before.startswith("<!--") else {}


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page in order, with their marks."""
    found = []
    for match in FENCE.finditer(page):
        text = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        line = page[: match.start()].count("\n") + 2
        found.append(Block(match["language"], text, line, marks_before(page, match.start())))
    rest = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page)
    for match in INDENTED.finditer(rest):
        text = re.sub(r"^    ", "", match[0].strip("\n") + "\n", flags=re.M)
        line = rest[: match.start()].count("\n") + 1
        found.append(Block("", text, line, marks_before(rest, match.start())))
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
