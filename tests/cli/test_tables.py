"""Evaluations and comparisons on a terminal: the figures that were measured, and text that is never markup."""

from __future__ import annotations

import io

from rich.console import Console

from sapo.cli.tables import MOST_SLICES, Progress, comparison_table, evaluation_table, suite_table
from sapo.data import Status
from sapo.evaluation import ConstantAnswer, compare
from support.evaluation_cases import answered, counted, results, sample

MARKUP = "[red]x[/red][link=file:///etc/passwd]y[/link]"


def shown(renderable) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(renderable)
    return out.getvalue()


def row(text: str, name: str) -> list[str]:
    """The cells of the first row of that name."""
    line = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│┃ ").split("│")]


def test_every_figure_that_was_measured_has_a_row() -> None:
    problems = [
        answered(
            0, sample("x", 1.0, answer="1", figures={"cells": 1.0}), sample("y", answer="2"), greedy=sample("g", 1.0)
        ),
        answered(1, sample("x", answer="1"), sample("cut", status=Status.TRUNCATED), greedy=sample("g")),
    ]
    constant = ConstantAnswer("7", share=0.25, judged=1, distinct=1)
    text = shown(evaluation_table(results(problems, ks=(1, 2), constant=constant).evaluation))
    assert row(text, "mean@2")[1] == "0.250"
    assert row(text, "pass@2")[1] == "0.500"
    assert row(text, "majority@2")[1] == "0.250"  # a tie of right and wrong, and a wrong one
    assert row(text, "greedy")[1] == "0.500"
    assert row(text, "cells")[1] == "1.000"
    assert row(text, "best constant")[1:] == ["0.250", "always 7"]
    assert row(text, "truncated")[1:] == ["1", "25.0%"]


def test_no_answer_of_a_suite_leaves_out_what_was_cut() -> None:
    problems = [
        answered(0, sample("x", 1.0, answer="1"), sample("y", status=Status.UNPARSEABLE)),
        answered(1, sample("cut", status=Status.TRUNCATED), sample("cut", status=Status.TRUNCATED)),
    ]
    table = suite_table("s", {"sums": results(problems).evaluation})
    cells = dict(zip((str(column.header) for column in table.columns), row(shown(table), "sums"), strict=True))
    assert cells["no answer"] == "25.0%"  # by hand: one of four


def test_what_was_not_measured_has_none() -> None:
    text = shown(evaluation_table(counted([1, 0], 1).evaluation))
    for name in ("majority", "greedy", "best constant", "tokens/s", "by "):
        assert name not in text


def test_text_of_models_and_files_is_never_markup() -> None:
    problems = [answered(i, sample("x"), groups={"subject": f"{MARKUP}{i}"}) for i in range(2)]
    constant = ConstantAnswer(f"{MARKUP}", share=0.25, judged=1, distinct=1)
    text = shown(evaluation_table(results(problems, constant=constant).evaluation))
    assert f"{MARKUP}1" in text
    assert f"always {MARKUP[:24]}" in text
    a = counted([1, 0], 1).to_json()
    assert f"B: {MARKUP}" in shown(comparison_table(compare(a, a, ("a", MARKUP))))


def test_very_many_subjects_are_cut_and_the_rest_is_named() -> None:
    problems = [answered(i, sample("x"), groups={"subject": f"s{i:03}"}) for i in range(MOST_SLICES + 5)]
    text = shown(evaluation_table(results(problems).evaluation))
    assert f"s{MOST_SLICES - 1:03}" in text
    assert f"s{MOST_SLICES:03}" not in text
    assert f"the first {MOST_SLICES} of {MOST_SLICES + 5}" in text


def test_a_comparison_shows_difference_tests_and_counts() -> None:
    text = shown(comparison_table(compare(counted([1, 0, 0, 1], 1).to_json(), counted([1, 1, 1, 0], 1).to_json())))
    assert row(text, "B less A")[1] == "+0.250"
    assert row(text, "problems better, worse, equal")[1] == "2, 1, 1"
    assert row(text, "McNemar on the one sample")[1:] == ["1.000", "only A 1, only B 2"]  # 2 (1 + 3) / 2**3


def test_where_there_is_no_terminal_progress_is_a_few_lines() -> None:
    out = io.StringIO()
    with Progress(Console(file=out)) as progress:
        for done in range(1, 1001):
            progress(done, 1000)
        progress.note(MARKUP)
    lines = out.getvalue().splitlines()
    assert lines[0] == "100 of 1000 problems"
    assert len(lines) == 10, "nine tenths and the note"
    assert lines[-1] == f"note: {MARKUP}"
