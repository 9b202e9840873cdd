"""The pages of docs/ that are made from the code are what the code says now."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from scripts import commands, layout, models, pictures, reference

from sapo.config import RunConfig
from sapo.model.vision_families import FAMILIES

README = Path(__file__).parents[2] / "README.md"


def test_the_reference_of_recipe_keys_is_current() -> None:
    assert reference.PAGE.read_text() == reference.page(), "run `make reference`"


def test_the_page_of_commands_is_current() -> None:
    assert commands.PAGE.read_text() == commands.page(), "run `make reference`"


def test_the_picture_of_the_gates_is_drawn_by_the_objectives() -> None:
    assert pictures.PICTURE.read_text() == pictures.picture(), "run `python -m scripts.pictures`"


def test_the_table_of_packages_is_current() -> None:
    page = layout.PAGE.read_text()
    assert page == layout.page(page), "run `make reference`"


def test_the_page_of_models_is_that_of_the_last_survey() -> None:
    content = json.loads(models.RECORDS.read_text())
    assert models.PAGE.read_text() == models.page(content), "run `python -m scripts.models`"


def test_models_with_pictures_are_those_of_the_families() -> None:
    assert {name for names in models.PICTURES.values() for name in names.split(", ")} == set(FAMILIES)


def test_every_setting_of_a_recipe_says_what_it_is() -> None:
    assert [key.name for key in reference.keys_of(RunConfig) if not key.meaning] == []


def test_keys_of_nested_sections_and_of_lists_are_named_as_on_the_command_line() -> None:
    names = {key.name for key in reference.keys_of(RunConfig)}
    assert {"train.steps", "model.lora.rank", "tasks.N.prompt.stop", "objective.kl.coefficient"} <= names


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "int or null"),
        (list[float], "list of float"),
        (dict[str, int], "mapping of str to int"),
        (tuple[float, float], "2 floats"),
        (BaseModel, "section"),
    ],
)
def test_types_are_said_as_a_user_would(annotation: object, words: str) -> None:
    assert reference.type_in_words(annotation) == words


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (README.parent / link.partition("#")[0]).exists()] == []
