"""A comparison's report in a real browser: its tables hold the numbers of results.json, and it prints whole."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from sapo.report import make_report, write_page
from support.browser import CHROMIUM, MISSING
from support.report_cases import settings, step_records, write_comparison, write_run
from support.report_page import Visit, texts, wait

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

BROKEN = "hard-lr3e-4-seed1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """results.json of a comparison in which one run failed, and its report."""
    directory = tmp_path_factory.mktemp("compared") / "made"
    write_comparison(directory, failed=(BROKEN,))
    file = write_page(make_report([directory]), directory.parent / "report.html")
    return json.loads((directory / "results.json").read_text()), file


def table(visit: Visit, number: int) -> list[list[str]]:
    """Rows of the comparison's n-th table as they can be read."""
    return visit.page.evaluate(
        f"[...document.querySelectorAll('#comparison table')[{number}].rows]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def estimate(value: dict[str, float] | None, sign: str = "") -> str:
    """As table.md writes it."""
    assert value is not None
    return "{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]".format(sign=sign, **value)


def test_the_tables_hold_the_numbers_of_results_json(visit: Visit, made) -> None:
    results, file = made
    visit.open(file)
    head, *rows = table(visit, 0)
    assert head[:8] == [
        "arm", "learning rate", "final pass@1", "less soft", "best", "start", "collapsed", "final of each seed",
    ]  # fmt: skip
    for row, cell in zip(rows, results["cells"], strict=True):
        assert row[0] == cell["arm"]
        assert float(row[1]) == cell["learning_rate"]
        assert [row[2], row[4], row[5]] == [estimate(cell[key]) for key in ("final", "best", "start")]
        assert row[3] == ("baseline" if cell["difference"] is None else estimate(cell["difference"], "+"))
        assert row[6] == f"{cell['collapsed']} of {len(cell['seeds'])}"
        assert row[8].replace(",", "") == f"{cell['tokens']['generated']:.0f}"
    assert rows[-1][7] == ".062 x", "1 of 16, and the run that failed; 0.0625 is rounded as Python rounds it"
    _, *tuned = table(visit, 1)
    for row, best in zip(tuned, results["tuned"], strict=True):
        assert (row[0], float(row[1]), row[2]) == (best["arm"], best["learning_rate"], estimate(best["final"]))
    assert visit.complaints == []
    assert visit.requests == [file.as_uri()]


def test_every_run_is_listed_with_what_became_of_it(visit: Visit, made) -> None:
    results, file = made
    page = visit.open(file)
    _, *rows = table(visit, 3)
    for row, run in zip(rows, results["runs"], strict=True):
        task = run["tasks"]["add4"]
        assert row[:4] == [
            run["name"],
            "failed, step 2" if run["name"] == BROKEN else "finished",
            f"{task['start']:.3f}",
            f"{task['best']:.3f} ({task['best_step']})",
        ]
        assert row[4] == ("" if run["name"] == BROKEN else f"{task['final']:.3f}")
        assert row[5] == ("yes" if task["collapsed"] else "no")
        assert row[6] == ("ratio tail 2" if run["arm"] == "hard" else "none")
    assert f"{BROKEN} failed: step 3: the loss is <b>nan</b>" in texts(page, "#comparison li")
    alarms = results["warnings"]["add4"]
    [said] = [t for t in texts(page, "#comparison p") if "(detected)" in t]
    assert f"{alarms['detected']} of {alarms['collapsed']} collapsed runs were warned" in said
    assert f"{alarms['false_alarms']} of {alarms['healthy']} healthy ones" in said
    [ahead] = [t for t in texts(page, "#comparison p") if "steps ahead" in t]
    leads = [c["lead"] for c in alarms["collapses"] if c.get("lead", -1) >= 0]
    assert f"in {alarms['in_time']} of {alarms['detected']}: {min(leads)} to {max(leads)} steps ahead" in ahead
    assert ahead.endswith(f"{statistics.median(leads):g} in the median.")


def test_the_figures_hold_the_numbers_of_results_json_and_every_seed(visit: Visit, made) -> None:
    results, file = made
    page = visit.open(file)
    page.evaluate("sapoReport.drawAll()")
    plots = page.evaluate(
        "[...document.querySelectorAll('#figure-compared-final .plot')].map((p) => p.data.map((t) => "
        "({name: t.name, x: t.x, up: t.error_x?.array, down: t.error_x?.arrayminus, symbol: t.marker.symbol})))"
    )
    for rate, traces in zip(results["learning_rates"], plots, strict=True):
        for arm in results["arms"]:
            [cell] = [c for c in results["cells"] if (c["arm"], c["learning_rate"]) == (arm, rate)]
            own = [t for t in traces if t["name"] == arm]
            [interval] = [t for t in own if t["up"]]
            final = cell["final"]
            assert interval["x"] == [final["value"]]
            assert interval["up"][0] == pytest.approx(final["high"] - final["value"])
            assert interval["down"][0] == pytest.approx(final["value"] - final["low"])
            seeds = [x for t in own if not t["up"] for x in t["x"]]
            runs = [r for r in results["runs"] if (r["arm"], r["learning_rate"]) == (arm, rate)]
            assert sorted(seeds) == sorted(r["tasks"]["add4"]["final"] or 0.0 for r in runs)
            assert any(t["symbol"] == "x" for t in own) == any(r["name"] == BROKEN for r in runs)
    assert page.locator("#figure-compared-pass1 .plot").count() == 2, "axes for each arm"
    assert visit.complaints == []


def test_a_click_on_a_heading_sorts_its_table(visit: Visit, made) -> None:
    results, file = made
    page = visit.open(file)
    button = page.locator("#comparison table").first.get_by_role("button", name="final pass@1")
    values = sorted(cell["final"]["value"] for cell in results["cells"])
    for expected in (values, values[::-1]):
        button.click()
        assert [row[2][:5] for row in table(visit, 0)[1:]] == [f"{v:.3f}" for v in expected]


def test_a_double_click_in_a_legend_leaves_one_arm_and_another_brings_all_back(visit: Visit, made) -> None:
    page = visit.open(made[1])
    page.evaluate("sapoReport.drawAll()")
    shown = (
        "[...new Set(document.querySelector('#figure-reward .plot').data.filter((t) => t.visible).map((t) => t.name))]"
    )
    assert page.evaluate(shown) == ["soft", "hard"]
    page.locator("#figure-reward .legend button", has_text="hard").dblclick()
    assert page.evaluate(shown) == ["hard"]
    page.locator("#figure-reward .legend button", has_text="hard").dblclick()
    assert page.evaluate(shown) == ["soft", "hard"]


def test_a_report_without_a_comparison_has_no_part_for_one(visit: Visit, tmp_path: Path) -> None:
    page = visit.open(write_page(make_report([write_run(tmp_path / "a")]), tmp_path / "report.html"))
    assert page.locator("#comparison").is_hidden()
    assert page.locator("nav a", has_text="Comparison").is_hidden()


def test_on_paper_every_figure_is_drawn_in_its_width_and_in_light_colours(visit: Visit, made, tmp_path: Path) -> None:
    page = visit.open(made[1], "#theme=dark")
    page.evaluate(
        """addEventListener("beforeprint", () => {
          window.onPaper = [...document.querySelectorAll(".plot")].map((plot) => [
            plot.querySelectorAll(".main-svg").length, plot.clientWidth,
            Number(plot.querySelector(".main-svg")?.getAttribute("width")),
            plot.querySelectorAll(".trace, .fills path").length]);
          window.ink = document.querySelector("#figure-reward .plot").data[0].line.color;
        })"""
    )
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    drawn = page.evaluate("window.onPaper")
    assert len(drawn) == page.locator(".plot").count() > 20
    for layers, width, drawn_width, traces in drawn:
        assert layers > 0
        assert traces > 0
        assert drawn_width == pytest.approx(width, abs=1)
        assert width <= 700
    assert page.evaluate("window.ink") == "#0b62b0", "the first colour of the light palette"
    assert page.evaluate("document.querySelector('#figure-reward .plot').data[0].line.color") == "#6db3ff"
    assert "printing" not in page.evaluate("document.documentElement.className")
    assert visit.complaints == []


def test_figures_out_of_sight_are_drawn_without_being_looked_at(visit: Visit, made) -> None:
    page = visit.open(made[1])
    assert page.evaluate("scrollY") == 0
    wait(page, "document.querySelectorAll('.plot:not(.js-plotly-plot)').length === 0")


def test_a_rule_that_is_broken_at_every_step_is_one_row_that_opens(visit: Visit, tmp_path: Path) -> None:
    warnings = [
        {"kind": "warning", "step": step, "cause": "ratio_tail", "text": f"step {step}: <b>far</b>"}
        for step in range(1, 5)
    ]
    write_run(tmp_path / "runs" / "a", config=settings(0), records=[*step_records(4), *warnings])
    write_run(tmp_path / "runs" / "b", config=settings(1), records=[*step_records(4), *warnings[2:3] * 2])
    page = visit.open(write_page(make_report([tmp_path / "runs"]), tmp_path / "report.html"))
    rows = page.locator("#warning-table tbody tr")
    assert rows.count() == 2
    assert rows.nth(0).locator("td").all_text_contents()[:4] == ["a", "ratio tail", "4", "1 to 4"]
    assert rows.nth(1).locator("td").all_text_contents()[:4] == ["b", "ratio tail", "2", "3"]
    assert "6 warnings in 2 of 2 runs" in texts(page, "#headlines p")[0]
    rows.nth(0).locator("summary").click()
    page.wait_for_timeout(50)
    assert texts(page, "#warning-table li") == [f"step {step}: <b>far</b>" for step in (2, 3, 4)]
