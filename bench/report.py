"""From the figures of bench/results to the table with its goals, on the screen and in docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.limits import least_seconds, rates_of

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- written by python -m bench: begin -->", "<!-- written by python -m bench: end -->"
MIB = 2**20


def quick_or(place: Path, *, quick: bool) -> Path:
    """Where figures go: those of a quick run must not stand among the measured ones."""
    return Path(tempfile.gettempdir()) / "sapo-bench-quick" / place.name if quick else place


@dataclass(frozen=True)
class Goal:
    """What a measure should show.

    >>> Goal("rollout-tiny", "sapo float32", "generate float32", 5.0).what
    'time'
    """

    contest: str
    ours: str
    peer: str
    """Or `limit`: the share of the machine's limit."""
    at_least: float
    what: str = "time"
    """time: the peer takes so many times as long; memory: it needs so many times as much."""


GOALS = (
    Goal("rollout-135m", "sapo float32", "generate float32", 5.0),
    Goal("rollout-135m", "sapo float32", "vLLM float32", 1.3),
    Goal("rollout-135m", "sapo bfloat16", "generate float32", 8.0),
    Goal("rollout-135m", "sapo bfloat16", "vLLM bfloat16", 1.4),
    Goal("rollout-tiny", "sapo float32", "generate float32", 5.0),
    Goal("update-135m", "sapo float32", "TRL float32", 4.5),
    Goal("update-135m", "sapo bfloat16", "TRL float32", 8.0),
    Goal("step-135m", "sapo float32", "TRL float32", 4.0),
    Goal("step-135m", "sapo float32", "TRL float32", 2.0, "memory"),
    Goal("step-tiny", "sapo float32", "TRL float32", 4.0),
    Goal("step-tiny", "sapo float32", "TRL float32", 2.0, "memory"),
    *(
        Goal(f"head-{size}{kind}", "sapo float32", f"{peer} float32", at_least, what)
        for size in ("49k", "152k")
        for kind, at_least, what in (("", 2.4, "time"), ("-memory", 10.0, "memory"))
        for peer in ("TRL", "Liger")
    ),
    Goal("head-49k", "sapo float32", "limit", 0.7),
    Goal("head-152k", "sapo float32", "limit", 0.7),
    Goal("step-long-prompt", "sapo float32", "TRL float32", 6.0),
)


@dataclass(frozen=True)
class Line:
    """One comparison of the table.

    >>> Line("rollout", "sapo float32", "generate float32", "time", [4.0, 6.0, 5.0], 5.0).mark
    'met'
    """

    title: str
    ours: str
    peer: str
    what: str
    ratios: list[float]
    goal: float | None
    error: str | None = None

    @property
    def mark(self) -> str:
        """met or missed, judged by the median; nothing without a goal or a figure."""
        if self.goal is None or not self.ratios:
            return ""
        return "met" if statistics.median(self.ratios) >= self.goal else "missed"

    def cells(self) -> tuple[str, ...]:
        """As text: measure, ours, against, figure, range, goal, mark."""
        if self.error is not None:
            return (self.title, self.ours, self.peer, "could not run", self.error, _times(self.goal), "")
        share = self.peer == "limit"
        show = (lambda x: f"{x:.0%}") if share else (lambda x: f"{x:.2f} x")
        figure = show(statistics.median(self.ratios)) + (" memory" if self.what == "memory" else "")
        spread = f"{show(min(self.ratios))} .. {show(max(self.ratios))}" if len(self.ratios) > 1 else "one round"
        goal = "" if self.goal is None else f"{self.goal:.0%}" if share else _times(self.goal)
        return (self.title, self.ours, self.peer, figure, spread, goal, self.mark)


def _times(goal: float | None) -> str:
    return "" if goal is None else f"{goal:g} x"


def load_results(directory: Path) -> list[dict[str, Any]]:
    """The contests measured so far, in the order of the table."""
    from bench.contests import contests

    files = (directory / f"{c.name}.json" for c in contests())
    return [json.loads(f.read_text()) for f in files if f.is_file()]


def lines_of(result: dict[str, Any]) -> list[Line]:
    """Every comparison of a contest that has a goal or is of one dtype."""
    goals = {(g.ours, g.peer, g.what): g.at_least for g in GOALS if g.contest == result["name"]}
    lines = []
    for ours, record in result["sides"].items():
        if not ours.startswith("sapo"):
            continue
        for peer, its in result["sides"].items():
            same = ours.split()[-1] == peer.split()[-1]
            if peer.startswith("sapo") or not (same or any((ours, peer) == key[:2] for key in goals)):
                continue
            for what, ratios in _ratios(result, record, its).items():
                goal = goals.get((ours, peer, what))
                lines.append(Line(result["title"], ours, peer, what, ratios, goal, its.get("error")))
        if (least := least_seconds(result, ours.split()[-1])) is not None:
            shares = [least / s for s in record["seconds"]]
            lines.append(Line(result["title"], ours, "limit", "time", shares, goals.get((ours, "limit", "time"))))
    return lines


def _ratios(result: dict[str, Any], ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, list[float]]:
    if result["name"].endswith("-memory"):
        beyond = peer.get("beyond")
        # Nothing beyond what was there before would mean that the mark of the peak failed, not that we need no memory.
        return {"memory": [] if beyond is None or ours["beyond"] <= 0 else [beyond / ours["beyond"]]}
    ratios = {"time": [p / o for o, p in zip(ours["seconds"], peer["seconds"], strict=False)]}
    if result["name"].startswith("step") and "peak" in peer:
        ratios["memory"] = [peer["peak"] / ours["peak"]]
    return ratios


HEADINGS = ("measure", "ours", "against", "takes", "range", "goal", "")


def print_table(directory: Path, console: Console) -> None:
    """All that was measured, with a mark at each goal."""
    table = Table(*HEADINGS, title="how much longer the other takes, or how much more memory; share of the limit")
    colours = {"met": "green", "missed": "red", "": ""}
    for result in load_results(directory):
        for number, line in enumerate(lines_of(result)):
            title, *cells = line.cells()
            table.add_row(title if number == 0 else "", *cells, style=colours[line.mark] or None)
        table.add_section()
    console.print(table)


def markdown(results: list[dict[str, Any]]) -> str:
    """The generated part of the document: the goals, then every figure."""
    lines = [line for result in results for line in lines_of(result)]
    judged = [line for line in lines if line.mark or (line.goal is not None and line.error)]
    met = sum(line.mark == "met" for line in judged)
    parts = [f"## Goals: {met} of {len(judged)} met\n", _rows(HEADINGS, [_bold(line) for line in judged])]
    if left := unmeasured(results):
        parts.append("\nNot measured: " + "; ".join(f"{g.contest}, {g.ours} against {g.peer}" for g in left) + ".")
    for result in results:
        parts += [f"\n### {result['title']}\n", _where(result), "", _figures(result)]
        others = [line.cells()[1:5] for line in lines_of(result) if not line.mark]
        if others:
            parts += ["", _rows(HEADINGS[1:5], others)]
    return "\n".join(parts)


def unmeasured(results: list[dict[str, Any]]) -> list[Goal]:
    """Goals of which no figure and no failure is at hand, since a measurement or a side was left out."""
    had = {(r["name"], ours, peer) for r in results for ours in r["sides"] for peer in (*r["sides"], "limit")}
    return [g for g in GOALS if (g.contest, g.ours, g.peer) not in had]


def _bold(line: Line) -> tuple[str, ...]:
    *cells, mark = line.cells()
    return (*cells, f"**{mark}**" if mark == "missed" else mark)


def _where(result: dict[str, Any]) -> str:
    about = result["about"]
    versions = ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("date", "cpu", "threads", "device", "quick"))
    float32, bfloat16 = rates_of(result, "float32"), rates_of(result, "bfloat16")
    fastest = ", ".join(sorted({f["float32_by"] for f in result["machine"]}))
    return (
        f"`python -m bench {result['name']}`, {about['date']}, {about['cpu']}, {about['device']}, "
        f"{about['threads']} thread{'s' * (about['threads'] > 1)} a side; {versions}. In the same rounds the machine "
        f"multiplied at {float32.flops / 1e9:.0f} GFLOP/s in float32 (fastest by {fastest}) and "
        f"{bfloat16.flops / 1e9:.0f} in bfloat16, and read {float32.read / 1e9:.1f} GB/s."
    )


def _figures(result: dict[str, Any]) -> str:
    memory = result["name"].endswith("-memory")
    rows = []
    for name, side in result["sides"].items():
        if "error" in side:
            rows.append((name, "could not run", side["error"], "", ""))
            continue
        backends = side.get("backends", "its own")
        if memory:
            rows.append((name, f"{side['beyond'] / MIB:.0f} MiB", "", "", ""))
            continue
        seconds = statistics.median(side["seconds"])
        spread = f"{min(side['seconds']):.2f} .. {max(side['seconds']):.2f}"
        imports = side.get("imports") or 0
        peak = f"{side['peak'] / MIB:.0f}" + (f" ({(side['peak'] - imports) / MIB:.0f})" if imports else "")
        rows.append((name, f"{seconds:.2f} ({spread})", f"{side['work'] / seconds:.1f}", peak, backends))
    if memory:
        return _rows(("side", "peak beyond what was there and the weight gradient"), [r[:2] for r in rows])
    return _rows(
        ("side", "seconds, median (range)", "tokens/s", "peak MiB (beyond imports)", "GEMM by share of its time"), rows
    )


def _rows(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def write_document(directory: Path, document: Path = DOCUMENT) -> Path:
    """Replace what stands between the marks; what is written by hand around them stays.

    Raises:
        ValueError: the document has no marks.
    """
    text = document.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document} must hold the lines {BEGIN!r} and {END!r}; got neither or one; put them back")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    results = [r for r in load_results(directory) if not r["about"].get("quick")]
    document.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}")
    return document
