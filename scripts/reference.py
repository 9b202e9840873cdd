"""Write docs/reference.md, every key of a recipe, from the docstrings of its settings: `python -m scripts.reference`.

tests/docs/test_made_pages.py holds the page current.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sapo.config import RunConfig
from sapo.config.suites import SuiteConfig
from sapo.workflows.comparing.config import ComparisonConfig
from scripts import commands

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"

HEAD = """# Every key of a recipe

<!-- Made from the docstrings of src/sapo/config by `make reference`; do not edit. -->

A recipe is a YAML file. Any key can be given on the command line as `key=value`, with dots between the levels:
`sapo train quickstart train.steps=20 tasks.0.digits=3`. An unknown key is refused, with the nearest known one. Settings
of a task or of an objective beside those below are its own: docs/tasks.md and docs/verifiers.md have the tasks' and the
verifiers', src/sapo/objectives the objectives'.
"""

SUITE = """## A suite

`sapo eval MODEL --suite SUITE` reads a YAML file with these keys ([evaluation.md](evaluation.md)). A benchmark may
set those of `settings` for itself; its further keys are those of its task.
"""

PLACES: dict[Any, str] = {list: "N.", dict: "NAME."}
"""What stands in a key for the place of a section among several."""


@dataclass(frozen=True)
class Key:
    """One setting of a recipe.

    >>> Key("train.steps", "int", "required", "Rollout batches.").name
    'train.steps'
    """

    name: str
    type: str
    default: str
    meaning: str


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield the settings of a section, those of the sections inside it included."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        meaning = " ".join((field.description or "").split())
        yield Key(key, type_in_words(field.annotation), default_in_words(field), meaning)
        for inner, place in sections_in(field.annotation):
            yield from keys_of(inner, f"{key}.{place}")


def sections_in(annotation: Any, place: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the sections that a type holds, and "N." for the members of a list, "NAME." for those of a mapping."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation, place
        return
    for inner in get_args(annotation):
        yield from sections_in(inner, place or PLACES.get(get_origin(annotation), ""))


def type_in_words(annotation: Any) -> str:
    """Return a type as a user would say it.

    >>> type_in_words(float | None), type_in_words(list[int]), type_in_words(Literal["a", "b"])
    ('float or null', 'list of int', 'a, b')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        names = [type_in_words(a) for a in inner if a is not type(None)]
        return " or ".join([*names, "null"] if type(None) in inner else names)
    if origin is Literal:
        return ", ".join(map(yaml_value, inner))
    if origin is list:
        return f"list of {type_in_words(inner[0])}"
    if origin is dict:
        return f"mapping of {type_in_words(inner[0])} to {type_in_words(inner[1])}"
    if origin is tuple:
        return f"{len(inner)} {type_in_words(inner[0])}s"
    if hasattr(annotation, "__metadata__"):
        return type_in_words(annotation.__origin__)
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    return {Any: "any"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_in_words(field: FieldInfo) -> str:
    """Return the default of a setting as YAML, or "required"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return f"{len(value)} sections"
    return "see below" if isinstance(value, BaseModel) else yaml_value(value)


def yaml_value(value: Any) -> str:
    """Return a plain value as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    return repr(value) if isinstance(value, str) and not re.fullmatch(r"[\w.-]+", value) else str(value)


def table(keys: list[Key]) -> str:
    """Return settings as a table of markdown."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.meaning)
        rows.append("| " + " | ".join(as_cell(cell) for cell in cells) + " |")
    return "\n".join(rows)


def as_cell(text: str) -> str:
    """Return text for a cell of a table: Markdown would take what stands in angle brackets, outside code, for HTML.

    >>> as_cell("runs/<name>, or `a<b|c`")
    'runs/&lt;name>, or `a<b\\\\|c`'
    """
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if code % 2 else part.replace("<", "&lt;") for code, part in enumerate(parts))


def page() -> str:
    """Return the whole page."""
    sections: dict[str, list[Key]] = {"The run": []}
    for key in keys_of(RunConfig):
        first, dot, _ = key.name.partition(".")
        sections.setdefault(f"`{first}`" if dot else "The run", []).append(key)
    parts = [HEAD, f"A recipe of one run has {sum(map(len, sections.values()))} keys.\n"]
    for title, keys in sections.items():
        parts.append(f"## {title}\n\n{table(keys)}\n")
    own = [key for key in keys_of(ComparisonConfig) if key.name not in RunConfig.model_fields]
    parts.append(f"## A comparison\n\n`sapo compare RECIPE` reads these keys beside those of a run.\n\n{table(own)}\n")
    of_all = {key.name.partition(".")[2] for key in keys_of(SuiteConfig) if key.name.startswith("settings.")}
    suite = [key for key in keys_of(SuiteConfig) if key.name.removeprefix("benchmarks.NAME.") not in of_all]
    parts.append(f"{SUITE}\n{table(suite)}\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, and that of the commands."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
    commands.main()


if __name__ == "__main__":
    main()
