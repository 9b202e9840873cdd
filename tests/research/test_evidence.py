"""The evidence's figures are those of the runs, its tables those of the figures, and its commands those that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from research.evidence.document import DOCUMENT, MARKS, RESULTS, TABLES, write_tables
from research.evidence.measures import figures_of_run, over_runs, read_updates, theory_of_comparison
from research.evidence.studies import STUDIES

import sapo


def update(step: int, *, on_policy: bool = False, **figures: float) -> dict:
    return {"kind": "update", "step": step, "update": 0, "on_policy": on_policy, "skipped": False, **figures}


def write_run(directory: Path, lines: list[dict]) -> None:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_only_updates_off_policy_that_moved_the_weights_are_read(tmp_path):
    off = update(1, grad_norm=2.0)
    skipped = update(2, grad_norm=9.0) | {"skipped": True}
    write_run(tmp_path / "run", [{"kind": "step", "step": 1}, update(1, on_policy=True, grad_norm=7.0), off, skipped])
    assert read_updates(tmp_path / "run") == [off]


def test_means_maxima_and_sums_are_taken_of_the_figures_they_belong_to():
    figures = figures_of_run(
        [
            update(1, **{"theory/variance_mean": 0.1, "theory/variance_max": 0.5, "theory/bound_violations": 1}),
            update(2, **{"theory/variance_mean": 0.3, "theory/variance_max": 0.4, "theory/bound_violations": 2}),
        ]
    )
    assert figures["theory/variance_mean"] == pytest.approx(0.2)
    assert figures["theory/variance_max"] == 0.5
    assert figures["theory/bound_violations"] == 3
    assert figures["updates"] == 2
    assert "grad_norm" not in figures  # not measured is left out, never 0


def test_runs_of_a_cell_are_joined_and_cells_kept_apart(tmp_path):
    runs = []
    for arm, norm in (("a", 1.0), ("a", 3.0), ("b", 5.0)):
        name = f"{arm}-{norm}"
        write_run(tmp_path / "runs" / name, [update(1, grad_norm=norm)])
        runs.append({"name": name, "arm": arm, "learning_rate": 1e-4})
    theory = theory_of_comparison(tmp_path, runs)
    assert theory["a 0.0001"]["grad_norm"] == {"mean": 2.0, "low": 1.0, "high": 3.0}
    assert theory["b 0.0001"]["grad_norm"]["mean"] == 5.0


def test_a_figure_that_some_runs_lack_is_over_those_that_have_it():
    assert over_runs([{"x": 1.0}, {}])["x"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_tables_are_written_between_their_marks_and_the_rest_stays(tmp_path):
    document = tmp_path / "evidence.md"
    document.write_text("before\n<!-- table bias bias_force -->\nold\n<!-- end -->\nafter\n")
    write_tables(tmp_path, document)
    assert "old" in document.read_text()  # no figures: what stands there stays
    draw = {"dose": 0.0111, "forces": [{"objective": "sapo", "force": 0.003}, {"objective": "grpo"}]}
    measured = {"name": "e4m3", "draws": [draw, draw | {"dose": 0.0121}]}
    (tmp_path / "bias_force.json").write_text(json.dumps({"measurements": [measured]}))
    write_tables(tmp_path, document)
    before, table, after = document.read_text().partition("| e4m3 | 0.0116 (0.0111 .. 0.0121) | 0.003 (0.003 .. 0.003)")
    assert before.startswith("before\n")
    assert after.endswith("<!-- end -->\nafter\n")
    assert table
    assert "| not resolved | not resolved |" in after  # GRPO without a force, GSPO without a line
    assert "old" not in document.read_text()


def test_the_document_says_what_the_figures_say(tmp_path):
    copy = tmp_path / "evidence.md"
    copy.write_text(DOCUMENT.read_text())
    write_tables(RESULTS, copy)
    assert copy.read_text() == DOCUMENT.read_text(), "python -m research.evidence --tables writes the tables anew"


def test_every_table_of_the_document_has_its_figures():
    marks = list(MARKS.finditer(DOCUMENT.read_text()))
    assert marks
    for mark in marks:
        assert mark["kind"] in TABLES
        for name in mark["names"].split():
            assert (RESULTS / f"{name}.json").is_file(), name


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_is_what_its_figures_were_taken_of(study):
    plan = sapo.load_comparison(
        study.recipe,
        list(study.settings),
        objectives=list(study.objectives) or None,
        learning_rates=list(study.learning_rates) or None,
        seeds=study.seeds,
    )
    kept = json.loads((RESULTS / f"{study.name}.json").read_text())["results"]
    assert list(plan.arms) == list(kept["arms"])
    assert list(plan.learning_rates) == kept["learning_rates"]
    assert list(plan.seeds) == kept["seeds"]
    assert plan.base.train.steps == kept["budget"]["steps"]
