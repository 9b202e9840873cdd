"""The glossary has the words that the terminal prints, each once, and pages for newcomers lead to it."""

from __future__ import annotations

import re
from html import unescape

from sapo.diagnostics.titles import metric_title
from sapo.front.lines import COLUMNS, GLOSSARY
from support.pages import DOCS, ROOT

ROWS = [
    [unescape(cell.strip()) for cell in line.strip("|").split("|")]
    for line in (DOCS / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| word", "|---"))
]


def test_words_of_a_steps_line_are_in_it() -> None:
    words = {row[0] for row in ROWS}
    printed = {metric_title("step", name).title.removeprefix("batch ") for name, _ in COLUMNS}
    printed |= {line.partition(":")[0] for line in GLOSSARY} | {"log pi_old", "self-check", "greedy", "best constant"}
    assert printed - words == set()


def test_each_word_stands_once_and_has_a_plain_one_beside_it() -> None:
    words = [row[0] for row in ROWS]
    assert len(words) == len(set(words))
    assert [row[0] for row in ROWS if len(row) != 3 or len(row[1]) < 10] == []


def test_pages_that_show_what_the_terminal_prints_lead_to_it() -> None:
    for page in (
        ROOT / "README.md",
        DOCS / "start/laptop.md",
        DOCS / "usage.md",
        DOCS / "metrics.md",
        DOCS / "index.md",
    ):
        assert re.search(r"\]\([./\w]*glossary\.md\)", page.read_text()), page
