"""`sapo report`: runs as one page to look at, and as images for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapo.cli.completion import complete_reported
from sapo.cli.terminal import say, stop_signals

# For the annotation only: `--help` is to answer before a library is loaded.
if TYPE_CHECKING:
    from sapo.report.assemble import RunReport


Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="Run directories, a comparison's directory, or a directory of runs.",
        autocompletion=complete_reported,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=10**9,
        help="Tokens that the token view may hold, of responses and of what was said between them; 0 for all.",
        show_default="200000",
    ),
]


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    watch: Annotated[
        bool, typer.Option("--watch", help="Rewrite the page while runs are under way, until they end or Ctrl-C.")
    ] = False,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write the figures there, as PNG and PDF for a paper, and their numbers as CSV."
        ),
    ] = None,
    tokens: Tokens = None,
) -> None:
    """Make a page of runs: their story in figures, the paper's figures, and every token that was logged."""
    from sapo.errors import ConfigError
    from sapo.report import make_report, write_page
    from sapo.report.images import check_images, write_images
    from sapo.report.live import watch as keep_writing
    from sapo.report.tokens import DEFAULT_TOKENS
    from sapo.utils.files import check_output

    if out.is_dir():
        raise ConfigError(f"--out must be a file; got the directory {out}; try {out / 'report.html'}")
    check_output(out, "--out")
    if png is not None:
        check_output(png, "--png", directory=True)
        check_images()
    budget = DEFAULT_TOKENS if tokens is None else tokens or None
    if watch:
        with stop_signals() as stop:
            say(
                f"writing {out} while the runs are under way; open it in a browser, it reloads itself; Ctrl-C ends this"
            )
            made = keep_writing(runs, out, tokens=budget, should_stop=stop)
    else:
        made = make_report(runs, tokens=budget)
        write_page(made, out)
    _say_what_is_in(made)
    chunks = len(made.tokens.chunks)
    count = f"{chunks} step" if chunks == 1 else f"{chunks} steps"
    say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB, {count} token by token)")
    if png is not None:
        files = write_images(made.figures, png)
        say(f"wrote {len(files) // 3} figures as PNG, PDF and CSV to {png}")
    say(f"next: open {out} in a browser")


def _say_what_is_in(made: RunReport) -> None:
    """Print the sentences of a report, and which figures have nothing to show."""
    from sapo.report.compared import words_of

    for problem in made.problems:
        say(problem)
    for comparison, _ in made.compared:
        for line in words_of(comparison):
            say(line)
    for line in made.headlines:
        say(line)
    missing = [f for f in made.figures if f.missing]
    if missing:
        say(f"not measured: {', '.join(f.title for f in missing)}; the page says how to measure them")
