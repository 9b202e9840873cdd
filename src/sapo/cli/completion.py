"""Shell completion: recipes, tasks, run directories, keys of a recipe and the values of some of them.

Names that lie in files are found without loading the library; keys and objectives take it, a second or two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from sapo.utils.shipped import shipped_recipes, shipped_suites

MODEL_FILE, RUN_FILE, COMPARISON_FILE = "config.json", "config.yaml", "comparison.yaml"


def complete_recipe(incomplete: str) -> list[str]:
    """Complete shipped recipes, and YAML files below the directory being typed."""
    return _starting_with(
        incomplete, [*sorted(shipped_recipes()), *_paths(incomplete, lambda p: p.suffix in (".yaml", ".yml"))]
    )


def complete_run(incomplete: str) -> list[str]:
    """Complete run directories: those with a config.yaml."""
    return _starting_with(incomplete, [*_runs(), *_paths(incomplete, lambda p: (p / RUN_FILE).is_file())])


def complete_comparison(incomplete: str) -> list[str]:
    """Complete recipes, and directories of comparisons that were begun."""
    begun = sorted(str(f.parent) for f in Path("comparisons").glob(f"*/{COMPARISON_FILE}"))
    elsewhere = _paths(incomplete, lambda p: (p / COMPARISON_FILE).is_file())
    return _starting_with(incomplete, [*begun, *complete_recipe(incomplete), *elsewhere])


def complete_reported(incomplete: str) -> list[str]:
    """Complete what a report can be made of: runs, and comparisons that were begun."""
    begun = sorted(str(f.parent) for f in Path("comparisons").glob(f"*/{COMPARISON_FILE}"))
    elsewhere = _paths(incomplete, lambda p: any((p / file).is_file() for file in (RUN_FILE, COMPARISON_FILE)))
    return _starting_with(incomplete, [*_runs(), *begun, *elsewhere])


def complete_rounded(incomplete: str) -> list[str]:
    """Complete precisions of a sampler."""
    from sapo.config import SamplerDtype

    return _starting_with(incomplete, list(get_args(SamplerDtype)))


def complete_objective(incomplete: str) -> list[str]:
    """Complete objectives between commas."""
    from sapo.objectives import OBJECTIVES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in OBJECTIVES if name.startswith(last)]


def complete_arm(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete arms of the comparison recipe on the line, between commas, each once."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    names = [name for name in _arms(ctx) if name.startswith(last) and name not in taken]
    return [f"{before}{comma}{name}" for name in names]


def complete_baseline(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete one of the arms: those of --arms or --objectives where given, else all of the recipe's."""
    given = ctx.params.get("arms") or ctx.params.get("objectives")
    arms = _arms(ctx)
    if not arms:  # a recipe of one run
        from sapo.workflows.comparing.config import OBJECTIVES as COMPARED

        arms = list(COMPARED)
    return _starting_with(incomplete, given.split(",") if given else arms)


def complete_model(incomplete: str) -> list[str]:
    """Complete run directories, and directories with a model."""
    models = _paths(incomplete, lambda p: (p / RUN_FILE).is_file() or (p / MODEL_FILE).is_file())
    return _starting_with(incomplete, [*_runs(), *models])


def complete_task(incomplete: str) -> list[str]:
    """Complete tasks by name, and files of rows."""
    from sapo.tasks import TASKS
    from sapo.tasks.rows.reading import is_rows_file

    files = _paths(incomplete, is_rows_file)
    return _starting_with(incomplete, [*sorted(TASKS), *files])


def complete_suite(incomplete: str) -> list[str]:
    """Complete shipped suites, and YAML files below the directory being typed."""
    files = _paths(incomplete, lambda p: p.suffix in (".yaml", ".yml"))
    return _starting_with(incomplete, [*sorted(shipped_suites()), *files])


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete KEY= of a recipe, one section at a time, or the value of a key that has few values.

    bash cuts words at "=": there `objective.name=sa` arrives as three words, of which only the last is completed.
    """
    before = [str(word) for words in ctx.params.values() if isinstance(words, list | tuple) for word in words]
    if before[-1:] == ["="]:
        return _values(before[-2], incomplete) if len(before) > 1 else []
    if before and "=" not in before[-1] and not incomplete:  # the cursor is right behind the "="
        return _values(before[-1], "")
    key, separator, value = incomplete.partition("=")
    if separator:
        return [f"{key}={v}" for v in _values(key, value)]
    return _starting_with(incomplete, _keys(incomplete))


def _keys(incomplete: str) -> list[str]:
    """Return the keys of the section being typed: sections end in a dot, settings in an equals sign."""
    from sapo.config import RunConfig

    parent, _, _ = incomplete.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if parent == "objective":
        return [prefix + f"{name}=" for name in _objective_keys()]
    section = _section(RunConfig, parent.split(".") if parent else [])
    if section is None:
        return []
    keys = []
    for name, field in section.model_fields.items():
        if not prefix and name == "provenance":  # written by the run, never read
            continue
        keys.append(prefix + name + ("." if _sections_in(field.annotation) else "="))
    return keys


def _values(key: str, value: str) -> list[str]:
    """Return the values a key may have, where they are few."""
    from sapo.config import RunConfig
    from sapo.objectives import NORMALIZERS, OBJECTIVES

    if key == "objective.name":
        return _starting_with(value, OBJECTIVES)
    if key == "objective.normalizer":
        return _starting_with(value, NORMALIZERS)
    if key.startswith("tasks.") and key.endswith(".name"):
        return complete_task(value)
    if key == "model.path":
        return complete_model(value)
    *parents, name = key.split(".")
    section = _section(RunConfig, parents)
    field = None if section is None else section.model_fields.get(name)
    return [] if field is None else _starting_with(value, _choices(field.annotation))


def _section(section: Any, parts: list[str]) -> Any:
    """Return the settings that a dotted key leads to, a number standing for an item of a list; None when it leads
    nowhere."""
    for part in parts:
        if part.isdigit():  # tasks.0: the list's own kind was found on the way
            continue
        field = section.model_fields.get(part)
        inner = [] if field is None else _sections_in(field.annotation)
        if not inner:
            return None
        section = inner[0]
    return section


def _sections_in(annotation: Any) -> list[Any]:
    """Return the sections (pydantic models) in a type, through lists and alternatives."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections_in(inner)]


def _choices(annotation: Any) -> list[str]:
    """Return the words a type allows."""
    if annotation is bool:
        return ["true", "false"]
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [
        choice for inner in get_args(annotation) if get_origin(annotation) is not list for choice in _choices(inner)
    ]


def _objective_keys() -> list[str]:
    """Return the recipe's own settings of an objective, then the hyperparameters of the objectives."""
    from dataclasses import fields

    from sapo.config import ObjectiveConfig
    from sapo.objectives import OBJECTIVES

    hyperparameters = [field.name for objective in OBJECTIVES.values() for field in fields(objective)]
    return list(dict.fromkeys([*ObjectiveConfig.model_fields, *hyperparameters]))


def _arms(ctx: typer.Context) -> list[str]:
    """Return the arms of the comparison recipe or directory on the line; none of a recipe of one run."""
    from sapo.config.recipes import read_recipe
    from sapo.errors import ConfigError

    # Where a line ends in an option without its value, click has not parsed the arguments yet.
    recipe = ctx.params.get("recipe") or next(iter(ctx.args), None)
    if recipe is None:
        return []
    begun = Path(recipe) / COMPARISON_FILE
    try:
        _, settings = read_recipe(begun if begun.is_file() else recipe)
    except (ConfigError, OSError):
        return []
    arms = settings.get("arms")
    return [str(name) for name in arms] if isinstance(arms, dict) else []


def _runs() -> list[str]:
    return sorted(str(f.parent) for f in Path("runs").glob(f"*/{RUN_FILE}"))


def _paths(incomplete: str, wanted: Any) -> list[str]:
    """Return the entries of the directory being typed that are wanted, and directories that may lead to some."""
    directory, _, start = incomplete.rpartition("/")
    base = Path(directory + "/" if directory or incomplete.startswith("/") else ".")
    found = []
    try:
        entries = sorted(base.iterdir())
    except OSError:
        return []
    for entry in entries:
        name = f"{directory}/{entry.name}" if "/" in incomplete else entry.name
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start.startswith(".")):
            continue
        if wanted(entry):
            found.append(name)
        elif entry.is_dir() and os.access(entry, os.R_OK):
            found.append(name + "/")
    return found


def _starting_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name.startswith(incomplete)))
