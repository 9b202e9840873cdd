"""`sapo doctor`: what is installed, what the machine can do, what is missing and how to add it."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red", "note": ""}


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Report too how this model is trained and decoded: a directory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report what is installed, what this machine can do, and what is missing."""
    from sapo.workflows.doctor import examine, examine_model, is_broken

    findings = examine() if model is None else [*examine(), *examine_model(model)]
    broken = is_broken(findings)
    if as_json:
        print(json.dumps({"ok": not broken, "findings": [asdict(f) for f in findings]}, indent=1))
        raise typer.Exit(int(broken))
    console = Console(emoji=False)
    width = max(len(f.name) for f in findings)
    for section, group in groupby(findings, key=lambda f: f.section):
        console.print(Text(section, style="bold"))
        for finding in group:
            state = "" if finding.state == "note" else finding.state
            line = Text(f"  {finding.name:{width}}  ")
            line.append(f"{state:8}", style=STYLES[finding.state]).append(finding.value)
            if finding.way_out:
                line.append(f"\n  {'':{width}}  {'':8}").append(finding.way_out, style="bold")
            console.print(line, soft_wrap=True)
    if broken:
        console.print("something a run needs is broken: see above", soft_wrap=True)
    raise typer.Exit(int(broken))
