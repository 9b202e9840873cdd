"""`sapo watch`: the report of runs in a browser, as they go on."""

from __future__ import annotations

from typing import Annotated

import typer

from sapo.cli.report import Runs, Tokens
from sapo.cli.serve import Host
from sapo.cli.terminal import say, stop_signals


def watch(
    runs: Runs,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8800,
    tokens: Tokens = None,
) -> None:
    """Serve the report of runs on a page that follows them: steps, samples and figures as they come; it only reads."""
    from sapo.report.page import plotly_script
    from sapo.report.served import Watch, application, refusal
    from sapo.report.tokens import DEFAULT_TOKENS
    from sapo.rollout.servers.guard import TOKEN
    from sapo.workflows.serving.web import Guard, bound, serve

    with bound(host, port) as (taken, address), stop_signals() as stop:
        plotly_script()
        shown = DEFAULT_TOKENS if tokens is None else tokens or None
        watching = Watch(runs, shown, on_trouble=lambda text: say(f"warning: {text}"))
        # A token of the user's is not shown: its name stands for it.
        ask = "" if address.token is None else f"/?token={address.token if address.made else f'${TOKEN}'}"

        def ready() -> None:
            say(f"watching {watching.report.title} at {address.url}{ask}; open it in a browser; Ctrl-C ends this")

        watching.start()
        try:
            serve(
                Guard(application(watching), address, refusal),
                taken,
                should_stop=stop,
                on_ready=ready,
                on_stop=watching.close,
            )
        finally:
            watching.close()
    say(f"next: sapo report {' '.join(map(str, runs))}")
