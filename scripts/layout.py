"""Write the table of packages into docs/architecture.md, from their docstrings: `python -m scripts.layout`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import sapo

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
MARKS = "<!-- packages -->", "<!-- /packages -->"

# From the top floor down, as tests/test_floors.py has them.
ORDER = (
    *("cli", "report", "workflows", "run", "integrations", "evaluation", "diagnostics", "rollout", "training"),
    *("conformance", "config", "model", "tasks", "environments", "objectives", "data", "utils", "sandbox"),
)


def table() -> str:
    """Return one row for each package: its name, its files, and the first sentence of its docstring."""
    rows = ["| package | what it holds | files |", "|---|---|---|"]
    for package in ORDER:
        folder = Path(sapo.__file__).parent / package
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        paragraph = " ".join(docstring.partition("\n\n")[0].split())
        files = sum(1 for f in folder.rglob("*.py") if f.name != "__init__.py")
        rows.append(f"| `{package}` | {paragraph} | {files} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """Return a page with the table between its marks made anew."""
    between = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    return re.sub(between, lambda _: f"{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}", text, flags=re.DOTALL)


def main() -> None:
    """Write the table."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
