"""The table of features: of ours each has a page or a reason, and no letter stands for nothing."""

from __future__ import annotations

import re

from support.pages import DOCS

PAGE = (DOCS / "features.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| \d", line)]


def test_there_are_41_features_numbered_in_order() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 42))


def test_each_cell_is_yes_in_part_no_or_none_found() -> None:
    assert {letter for row in ROWS for letter in row[2:9]} == {"Y", "P", "N", "\N{EN DASH}"}


def test_none_found_is_said_of_projects_that_were_not_installed_alone() -> None:
    head = next(line for line in PAGE.splitlines() if line.startswith("| # |"))
    names = [cell.strip() for cell in head.strip("|").split("|")]
    found = {names[place] for row in ROWS for place, letter in enumerate(row) if letter == "\N{EN DASH}"}
    assert found == {"ms-swift", "prime-rl", "SkyRL", "unsloth"}


def test_each_yes_of_ours_leads_to_a_page_and_each_other_letter_to_a_reason() -> None:
    for number, _, *letters, where in ROWS:
        if letters[-1] == "Y":
            assert re.fullmatch(r"\[[^\]]+\]\([^)]+\)", where), where
        else:
            assert where == f"reason {number}"
            assert re.search(rf"^\*\*{number}\. ", PAGE, flags=re.M), f"no reason {number}"


def test_there_is_no_reason_for_what_is_there() -> None:
    explained = set(re.findall(r"^\*\*(\d+)\. ", PAGE, flags=re.M))
    assert explained == {row[0] for row in ROWS if row[8] != "Y"}
