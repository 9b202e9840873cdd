"""Write docs/commands.md, every command with its arguments and options: `python -m scripts.commands`.

It is made of the command line itself, and so says what `--help` says. tests/docs/test_made_pages.py holds it current.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from sapo.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"

HEAD = """# Every command

<!-- Made from src/sapo/cli by `make reference`; do not edit. -->

`sapo COMMAND --help` prints the same. KEY=VALUE are settings of a recipe ([reference.md](reference.md)).

Exit codes: 0 done; 2 a mistake of the caller, in one line; 1 a failed run; 130, 143, 129 and 138 stopped by Ctrl-C,
SIGTERM, SIGHUP or SIGUSR1, with everything saved.
"""


def cell(text: str) -> str:
    """Return text as a cell of a table.

    >>> cell("a|b   c")
    'a\\\\|b c'
    """
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def row(parameter: Any) -> str:
    """Return the row of an argument or an option."""
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        name = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    shown = "required" if parameter.required else ""
    if isinstance(getattr(parameter, "show_default", None), str):
        shown = parameter.show_default
    elif isinstance(default, str | int | float | Path) and not isinstance(default, bool):
        shown = f"`{default}`"
    return f"| {name} | {shown} | {cell(parameter.help or '')} |"


def section(name: str, command: Any) -> str:
    """Return the section of a command: what it does, how it is called, its parameters."""
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    called = " ".join(["sapo", name, *(p.metavar or p.name.upper() for p in arguments)])
    parts = [f"## sapo {name}", inspect.cleandoc(command.help or ""), f"    {called}"]
    if parameters:
        parts.append("\n".join(["| name | default | meaning |", "|---|---|---|", *map(row, parameters)]))
    return "\n\n".join(parts)


def page() -> str:
    """Return the whole page."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([HEAD, "\n\n".join(section(name, command) for name, command in commands.items()), ""])


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
