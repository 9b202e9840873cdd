"""A comparison in a report: which figures it shows, from where, and that nothing is hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapo.errors import ConfigError
from sapo.report import make_report
from sapo.report.compared import read_comparison, words_of
from sapo.report.figure import Figure
from support.report_cases import FINALS, RATES, write_comparison


def figures_of(path: Path) -> dict[str, Figure]:
    return {figure.key: figure for figure in make_report([path]).figures}


def test_what_is_shown_is_results_json_as_it_stands_there(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made")
    written = json.loads((tmp_path / "made" / "results.json").read_text())
    [(comparison, _)] = make_report([tmp_path / "made"]).compared
    shown = comparison.to_json()["results"]
    assert comparison.source == "results.json"
    for part in ("cells", "tuned", "warnings", "arms", "learning_rates", "seeds", "baseline", "budget"):
        assert shown[part] == written[part], part
    for there, here in zip(written["runs"], shown["runs"], strict=True):
        counted = {"warnings": {"ratio_tail": 2} if here["arm"] == "hard" else {}, "reason": ""}
        assert here == {**there, **counted}


def test_while_runs_go_on_what_has_ended_is_counted_as_sapo_compare_would(tmp_path: Path) -> None:
    going, waiting = "hard-lr3e-4-seed1", "soft-lr3e-4-seed1"
    results = write_comparison(tmp_path / "made", under_way=(going,), to_come=(waiting,))
    comparison = read_comparison(tmp_path / "made")
    assert comparison.results == results.to_json()
    assert comparison.source == "the runs that have ended so far"
    states = {run["name"]: run["state"] for run in comparison.to_json()["results"]["runs"]}
    assert (states[going], states[waiting]) == ("unfinished", "to come")
    assert len(states) == 8
    assert "8 runs: 6 have ended, 1 under way, 1 to come" in words_of(comparison)[0]
    # An earlier stop left its results: they are of fewer runs, and not taken.
    (tmp_path / "made" / "results.json").write_text(json.dumps({**results.to_json(), "cells": []}))
    assert read_comparison(tmp_path / "made").results["cells"]


def test_every_seed_is_a_point_beside_the_interval_of_its_arm(tmp_path: Path) -> None:
    results = write_comparison(tmp_path / "made")
    final = figures_of(tmp_path / "made")["compared-final"]
    assert [panel.title for panel in final.panels] == ["lr 1e-4", "lr 3e-4"]
    for rate, panel in zip(RATES, final.panels, strict=True):
        assert panel.y_names == ("soft", "hard")
        for arm in panel.y_names:
            points, interval = (
                next(t for t in panel.traces if (t.kind, t.name) == (kind, arm)) for kind in ("points", "intervals")
            )
            assert points.x == tuple(sum(FINALS[arm, seed]) / 16 for seed in (0, 1))
            [cell] = [c for c in results.cells if (c.arm, c.learning_rate) == (arm, rate)]
            assert (interval.x, interval.low, interval.high) == (
                (cell.final.value,),
                (cell.final.low,),
                (cell.final.high,),
            )
        assert panel.marks[0].at == pytest.approx(0.25), "every run starts at 4 of 16"
    difference = figures_of(tmp_path / "made")["compared-difference"]
    [points] = [t for t in difference.panels[0].traces if t.kind == "points"]
    assert points.x == tuple((sum(FINALS["hard", s]) - sum(FINALS["soft", s])) / 16 for s in (0, 1))
    assert points.hovers == ("seed 0", "seed 1")


def test_a_run_that_failed_is_a_cross_at_0_and_a_row_with_its_reason(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made", failed=("hard-lr1e-4-seed1",))
    final = figures_of(tmp_path / "made")["compared-final"].panels[0]
    [cross] = [t for t in final.traces if t.crossed]
    assert (cross.x, cross.hovers) == ((0.0,), ("seed 1: failed, counts as 0",))
    comparison = read_comparison(tmp_path / "made")
    assert "8 runs: 8 have ended, 1 of them failed" in words_of(comparison)[0]
    [run] = [r for r in comparison.to_json()["results"]["runs"] if r["state"] == "failed"]
    assert run["reason"] == "step 3: the loss is <b>nan</b>"


def test_learning_rates_have_axes_of_their_own_and_arms_their_colours(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made")
    figures = figures_of(tmp_path / "made")
    for key in ("reward", "pass1", "entropy", "variance", "ratios"):
        panels = figures[key].panels
        assert [panel.title for panel in panels] == ["lr 1e-4", "lr 3e-4"], key
        for panel in panels:
            colors = {(t.name, t.color) for t in panel.traces if t.name in ("soft", "hard")}
            assert colors == {("soft", 0), ("hard", 1)}, key
    assert figures["reward"].panels[0].y_range == figures["reward"].panels[1].y_range
    by_arm = figures["compared-reward"].panels
    assert [panel.title for panel in by_arm] == ["soft", "hard"]
    for panel in by_arm:
        # Of each rate a band, two seeds and their mean.
        assert [(t.kind, t.faint, t.name) for t in panel.traces if t.name == "lr 1e-4"] == [
            ("band", False, "lr 1e-4"),
            ("line", True, "lr 1e-4"),
            ("line", True, "lr 1e-4"),
            ("line", False, "lr 1e-4"),
        ]
    assert [panel.title for panel in figures["fig4"].panels] == ["lr 1e-4", "lr 3e-4"] * 2


def test_alarms_are_counted_by_cause_among_collapsed_and_healthy_runs(tmp_path: Path) -> None:
    results = write_comparison(tmp_path / "made")
    comparison = read_comparison(tmp_path / "made")
    [row] = comparison.to_json()["alarms"]["add4"]
    # hard, seed 0, falls from 6/16 to 1/16 at both rates; seed 1 to 3/16, which is half; it alone is warned.
    total = results.alarms("add4").to_json()
    counts = {name: total[name] for name in ("collapsed", "detected", "healthy", "false_alarms")}
    assert row == {"cause": "ratio_tail", **counts}
    assert (total["collapsed"], total["detected"]) == (2, 2)
    assert (total["healthy"], total["false_alarms"]) == (6, 2)


def test_the_words_name_the_best_rate_what_differs_and_what_collapsed(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made")
    comparison = read_comparison(tmp_path / "made")
    first, final, against, at_rates, collapsed = words_of(comparison)
    assert first.startswith("2 arms x 2 learning rates x 2 seeds = 8 runs, all ended. Every run: 4 steps of")
    assert "soft 0.469 [" in final  # (7 + 8) / 32
    assert "hard 0.125 [" in final  # (1 + 3) / 32
    assert "at 1e-4" in final
    assert "hard below it by 0.344 [" in against
    assert at_rates.startswith("Against soft at the same learning rate: hard below it by 0.344 [")
    assert "at 1e-4; hard below it by 0.344 [" in at_rates
    assert collapsed == "Collapsed: hard at 1e-4 1 of 2; hard at 3e-4 1 of 2."


def test_the_words_deny_a_difference_only_where_no_interval_of_a_table_excludes_0(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made")
    file = tmp_path / "made" / "results.json"
    results = json.loads(file.read_text())
    none, clear = {"value": 0.1, "low": -0.1, "high": 0.3}, {"value": 0.3, "low": 0.1, "high": 0.5}
    for row in (*results["tuned"], *results["cells"]):
        if row["difference"]:
            row["difference"] = none
    file.write_text(json.dumps(results))
    _, _, tuned, at_rates, _ = words_of(read_comparison(tmp_path / "made"))
    assert tuned.endswith("no interval of a difference from it excludes 0.")
    assert at_rates.endswith("no interval of a difference from it excludes 0.")
    next(c for c in results["cells"] if c["difference"])["difference"] = clear
    file.write_text(json.dumps(results))
    _, _, tuned, at_rates, _ = words_of(read_comparison(tmp_path / "made"))
    assert tuned.endswith("no interval of a difference from it excludes 0.")
    assert at_rates.endswith("hard above it by 0.300 [0.100, 0.500] at 1e-4; 1 other interval includes 0.")


def test_a_plan_of_another_version_is_said_and_its_runs_are_shown(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made", to_come=("soft-lr1e-4-seed0",))
    plan = tmp_path / "made" / "comparison.yaml"
    plan.write_text(plan.read_text().replace("objective.name: grpo", "objective.name: of_another_version"))
    report = make_report([tmp_path / "made"])
    assert report.compared == ()
    [problem] = report.problems
    said = "The figures of the comparison made cannot be computed, so its runs are shown without a table: "
    assert problem.startswith(said)
    assert len(report.lines) == 7


def test_results_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made")
    for content in ("[]", "{", "{}"):
        (tmp_path / "made" / "results.json").write_text(content)
        with pytest.raises(ConfigError, match=r"results\.json is not what `sapo compare` writes") as raised:
            make_report([tmp_path / "made"])
        assert "\n" not in str(raised.value)


def test_of_many_runs_the_time_is_shown_by_arm(tmp_path: Path) -> None:
    write_comparison(tmp_path / "made")
    few = figures_of(tmp_path / "made")["timings"].panels[0]
    assert len(few.traces[0].x) == 8
    write_comparison(tmp_path / "again")
    both = {f.key: f for f in make_report([tmp_path / "made", tmp_path / "again"]).figures}
    many = both["timings"].panels[0]
    assert many.x == "arm"
    assert len(many.traces[0].x) == 8, "arms at rates, of two comparisons"
    assert {t.name: t.y[0] for t in many.traces} == {"generate": 4.0, "update": 2.5}
    assert {"compared1-final", "compared2-final"} <= set(both)
