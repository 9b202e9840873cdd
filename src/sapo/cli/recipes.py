"""`sapo recipes`: the shipped recipes, each with the first sentence of its file."""

from __future__ import annotations

import re
from pathlib import Path

from sapo.cli.terminal import say


def recipes() -> None:
    """List the shipped recipes, of runs and of comparisons."""
    from sapo.config.recipes import known_comparisons, known_recipes

    for title, command, found in (
        ("runs", "sapo train", known_recipes()),
        ("comparisons", "sapo compare", known_comparisons()),
    ):
        width = max(map(len, found), default=0)
        say(f"{title}, for `{command} NAME`:")
        for name, file in sorted(found.items()):
            say(f"  {name:{width}}  {purpose(file)}")


def purpose(file: Path) -> str:
    """Return the first sentence of the comment that opens a recipe, or nothing where there is none."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=[.:])\s", " ".join(lines), maxsplit=1)[0].rstrip(".:")
