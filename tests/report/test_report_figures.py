"""Figures of a report: an arm keeps its colour, nothing is drawn again, every task is there, and labels stand apart."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from sapo.report import make_report
from sapo.report.assemble import RunReport
from sapo.report.figure import Figure, Panel, Trace
from sapo.report.images import draw, has_overlap, tick_boxes, write_images
from support.report_cases import settings, step_records, write_comparison, write_run


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    directory = tmp_path_factory.mktemp("figures")
    write_comparison(directory / "made")
    return make_report([directory / "made"])


def figures_of(report: RunReport) -> dict[str, Figure]:
    return {figure.key: figure for figure in report.figures}


def test_an_arm_has_one_colour_in_all_figures_and_rates_that_share_axes_a_dash_each(compared: RunReport) -> None:
    colors: dict[str, set[int]] = {}
    for key in ("compared-final", "compared-difference", "reward", "pass1"):
        for panel in figures_of(compared)[key].panels:
            for trace in panel.traces:
                colors.setdefault(trace.name, set()).add(trace.color)
    by_arm = figures_of(compared)["compared-pass1"]
    for panel in by_arm.panels:
        colors[panel.title] |= {trace.color for trace in panel.traces}
        dashes = {trace.name: trace.dash for trace in panel.traces if trace.kind == "line"}
        assert dashes == {"lr 1e-4": "solid", "lr 3e-4": "dash"}
    assert colors == {"soft": {0}, "hard": {1}}
    assert compared.compared_colors == ({"soft": 0, "hard": 1},)


def test_an_arm_of_two_comparisons_has_one_colour(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_comparison(tmp_path / name)
    report = make_report([tmp_path / "one", tmp_path / "two"])
    one, two = report.compared_colors
    assert one == two
    assert sorted(one.values()) == [0, 1]
    lines = [t for p in figures_of(report)["reward"].panels for t in p.traces if t.kind == "line" and not t.faint]
    assert {(t.color, t.dash) for t in lines if t.name.startswith("soft")} == {
        (one["soft"], dash) for dash in ("solid", "dash", "dot", "dashdot")
    }


def test_a_figure_of_the_paper_that_stands_above_is_named_and_not_drawn_again(compared: RunReport) -> None:
    fig4 = figures_of(compared)["fig4"]
    assert fig4.same_as == ("reward", "pass1")
    assert {t.name for p in fig4.panels for t in p.traces} == {"SAPO", "GRPO"}, "as the paper calls them"
    assert "panels" not in fig4.to_json()
    for y in ("mean reward", "held-out pass@1"):
        shown = [f.key for f in compared.figures if not f.same_as and any(y in p.y for p in f.panels if p.x == "step")]
        assert 1 <= len(shown) <= 2, (y, shown)


def test_pass_at_1_of_every_task_is_drawn(tmp_path: Path) -> None:
    records = step_records(4)
    records += [{**r, "task": "chain", "pass@1": r["pass@1"] / 2} for r in records if r["kind"] == "eval"]
    run = write_run(tmp_path / "a", config=settings(), records=records)
    panels = figures_of(make_report([run]))["pass1"].panels
    assert [panel.title for panel in panels] == ["add4", "chain"]
    first, second = (next(t for t in panel.traces if t.kind == "line") for panel in panels)
    assert second.y == tuple(value / 2 for value in first.y if value is not None)


def test_the_mean_reward_of_a_task_with_graded_rewards_is_drawn_in_place_of_pass_at_1(tmp_path: Path) -> None:
    records = step_records(4)
    for place, record in enumerate(r for r in records if r["kind"] == "eval"):
        record |= {"binary": False, "reward/mean": 0.25 + place / 4, "pass@1": 0.0}
    figure = figures_of(make_report([write_run(tmp_path / "a", config=settings(), records=records)]))["pass1"]
    (panel,) = figure.panels
    assert (figure.title, panel.y) == ("Held-out mean reward", "held-out mean reward")
    (line,) = panel.traces  # no band: an interval of pass@1 is none of the mean reward
    assert line.y == (0.25, 0.5)


def test_a_csv_beside_each_image_has_every_point(compared: RunReport, tmp_path: Path) -> None:
    final = figures_of(compared)["compared-final"]
    files = {file.name for file in write_images([final], tmp_path)}
    assert files == {f"compared-final.{ending}" for ending in ("png", "pdf", "csv")}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compared-final.csv").read_text())))
    points = [(p.title, t.name, x) for p in final.panels for t in p.traces for x in t.x]
    assert [(row["panel"], row["trace"], float(row["x"])) for row in rows] == points
    interval = next(t for t in final.panels[0].traces if t.kind == "intervals")
    assert (str(interval.low[0]), str(interval.high[0])) in {(row["low"], row["high"]) for row in rows}


def test_no_two_labels_of_an_axis_overlap_in_an_image(compared: RunReport) -> None:
    names = tuple(f"phase of a long name {i}" for i in range(12))
    crowded = Figure(
        "crowded",
        "Crowded",
        panels=(
            Panel("step", "y", (Trace("bars", names, tuple(range(12))),)),
            Panel("r", "y", (Trace("line", (0.31, 0.34), (1.0, 2.0)),), x_log=True),
            Panel("step", "y", (Trace("line", (1234567.0, 1234567.5), (1.0, 2.0)),)),
        ),
        columns=3,
    )
    for figure in [*(f for f in compared.figures if not f.missing), crowded]:
        drawn = draw(figure)
        drawn.canvas.draw()
        for axes in drawn.axes:
            for axis in (axes.xaxis, axes.yaxis):
                assert not has_overlap(tick_boxes(axis)), figure.key
