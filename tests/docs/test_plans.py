"""The tables of computed plans are what the code computes now."""

from __future__ import annotations

from scripts import plans


def test_the_tables_of_computed_plans_are_current() -> None:
    page = plans.PAGE.read_text()
    assert page == plans.page(page), "run `python -m scripts.plans`"
