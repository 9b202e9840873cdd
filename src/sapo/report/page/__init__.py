"""The report as one HTML file that needs nothing else: no server, no network; Plotly's script is in it.

Names of runs and texts of models are only ever data: figures and tables are JSON in the page, the token view is
compressed chunks that are unpacked on demand. The page's content security policy admits its own four scripts by their
hashes and no connection, so that text of a model could do nothing even if it became markup. (Styles are not restricted
to hashes: Plotly makes its own.) Served by `sapo watch` it has a fifth script, and connections to its own server.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sapo.errors import ConfigError
from sapo.report.assemble import RunReport
from sapo.utils.files import unwritable, write_whole
from sapo.utils.html import content_security_policy, embedded, filled


def write_page(report: RunReport, path: Path, *, reload_every: float | None = None) -> Path:
    """Write the page, whole or not at all.

    Args:
        reload_every: seconds between the page's reloads of itself, while its runs are under way; None for never.

    Raises:
        ConfigError: Plotly is not installed, or no file can be written under that name.
        StorageError: the disk is full or cannot be written to.
    """
    page = page_text(report, {} if reload_every is None else {"watch": reload_every})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise unwritable(path, "--out", error) from error
    return path


def page_text(report: RunReport, more: Mapping[str, Any], *, served: bool = False) -> str:
    """Return the page.

    Args:
        more: beside the report's own data.
        served: by `sapo watch`: it hears of news and asks for them, for its tokens too.

    Raises:
        ConfigError: Plotly is not installed.
    """
    own = {"compared": "compared.js", "tokens": "tokens.js", "script": "report.js"}
    scripts = {"plotly": plotly_script(), **{mark: part(name) for mark, name in own.items()}}
    style = part("report.css") + part("tokens.css") + (part("live.css") if served else "")
    live = part("live.js") if served else ""
    rules = policy([*scripts.values(), *([live] if served else [])])
    fields = {
        **scripts,
        "title": html.escape(f"sapo report: {report.title}"),
        "policy": html.escape(rules + "; connect-src 'self'" if served else rules),
        "style": style,
        "data": embedded({**report.to_json(), **more}),
        "chunks": "" if served else "\n".join(_chunk(i, chunk.data) for i, chunk in enumerate(report.tokens.chunks)),
        "live": f"<script>{live}</script>" if served else "",
    }
    return filled(part("report.html"), fields)


def plotly_script() -> str:
    """Return Plotly's script, from its package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("a report needs Plotly, which is not installed; pip install plotly") from error
    script: str = get_plotlyjs()
    return script


def policy(scripts: list[str]) -> str:
    """Return the content security policy: these scripts, styles of the page and of Plotly, images made in the page."""
    strict = content_security_policy(scripts, [])
    return strict.replace("style-src ", "style-src 'unsafe-inline'") + "; img-src data: blob:"


def part(name: str) -> str:
    """Read a file of the page from the package."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _chunk(place: int, data: str) -> str:
    return f'<script type="application/octet-stream" id="chunk-{place}">{data}</script>'
