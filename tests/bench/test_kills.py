"""Kills are kept as they are made, and their table goes between the marks of the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench.kills import BEGIN, DOCUMENT, END, KINDS, Kill, main, read_kills, table, write_document, write_kills

KILLS = [
    Kill("rank", 0, "1.00 s, in step 2", noticed=0.5, lost=4.0, equal=True, left=0, made=True),
    Kill("rank", 1, "9.00 s, in step 12", noticed=1.5, lost=8.0, equal=True, left=0, made=True),
    Kill("driver", 0, "3.00 s, in step 5", noticed=0.1, lost=12.0, equal=False, left=1, made=True),
    Kill("driver", 1, "30.00 s, in step 13", noticed=0.0, lost=0.0, equal=True, left=0, made=False),
]


def test_kills_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "results" / "kills.json"
    assert read_kills(file, seed=3) == []
    write_kills(file, 3, KILLS)
    assert read_kills(file, seed=3) == KILLS
    with pytest.raises(SystemExit, match="holds kills of seed 3, not 4"):
        read_kills(file, seed=4)


def test_the_table_counts_kills_that_hit_a_process() -> None:
    rows = table(KILLS).splitlines()[2:]
    # By hand: the medians of 0.5 and 1.5, and of 4 and 8; the second driver had ended before its kill.
    assert rows == [
        "| rank | 2 | 1.0 (0.5 to 1.5) | 6.0 (4.0 to 8.0) | 2 of 2 | 0 |",
        "| driver | 1 | 0.1 (0.1 to 0.1) | 12.0 (12.0 to 12.0) | 0 of 1 | 1 |",
    ]


def test_what_stands_around_the_marks_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_document(KILLS, page)
    assert page.read_text() == f"before\n{BEGIN}\n{table(KILLS)}\n{END}\nafter\n"
    assert END in DOCUMENT.read_text().partition(BEGIN)[2]


def test_a_run_ends_well_that_is_equal_leaves_nothing_and_does_not_hang() -> None:
    assert KILLS[0].well
    assert not KILLS[2].well
    assert not replace(KILLS[0], noticed=61.0).well
    assert replace(KILLS[0], kind="stopped", noticed=61.0).well, "a rank that is stopped has its timeout first"


def test_with_all_kills_made_nothing_is_started_and_the_code_tells_whether_all_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.kills.Runs.start", lambda *_, **__: pytest.fail("a run was started"))
    file = tmp_path / "kills.json"
    write_kills(file, 0, KILLS[:2])
    assert main(["rank", "--kills", "2", "--json", str(file)]) == 0
    write_kills(file, 0, KILLS)
    assert main(["rank", "driver", "--kills", "2", "--json", str(file)]) == 1
    with pytest.raises(SystemExit):
        main(["engin"])
    assert set(KINDS) == {"rank", "driver", "engine", "stopped"}
