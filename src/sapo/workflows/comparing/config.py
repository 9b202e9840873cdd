"""Comparison recipes: a base recipe, arms that differ from it, learning rates and seeds.

    recipe: moe_quickstart            # a recipe's name or file, or its settings themselves
    settings: {train.steps: 100}      # what differs from it in all runs
    arms:
      sapo: {objective: {name: sapo, tau_pos: 1.0, tau_neg: 1.05}}
      grpo: {objective: {name: grpo, eps_low: 0.2, eps_high: 0.27}}
    learning_rates: [1.0e-4, 2.0e-4]
    seeds: 3                          # or a list of them
    baseline: sapo                    # the first arm when left out
    quick: {settings: {train.steps: 20}, learning_rates: [1.0e-4], seeds: 2}

A recipe of one run becomes a comparison by what the command line adds to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from sapo.config import RunConfig
from sapo.config.recipes import parse_override, parse_settings, read_recipe, resolve_recipe
from sapo.config.section import CheckedNumbers
from sapo.errors import ConfigError
from sapo.objectives import find_objective, is_plugin
from sapo.utils.names import nearest
from sapo.workflows.comparing.plan import ComparisonPlan, as_overrides, flatten

OBJECTIVES = ("sapo", "gspo", "grpo")
"""Objectives that a recipe of one run compares by default: the paper's three."""

SEEDS = 3
"""Number of seeds by default, and the least that shows how far seeds lie apart."""

_RUN_BY_RUN = {
    "run_dir": "--out",
    "train.learning_rate": "learning_rates (--learning-rates)",
    "seed": "seeds (--seeds)",
}

QUICK_STEPS, QUICK_PROBLEMS, QUICK_SEEDS = 20, 64, 2
"""The small form of a comparison that has none of its own; at its first learning rate."""


class QuickConfig(CheckedNumbers):
    """The small form of a comparison (--quick): to see that it works, not to conclude from."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    settings: dict[str, Any] = Field({})
    """Settings of all runs, applied after the comparison's own settings."""
    arms: list[str] | None = None
    """Arms to run; null runs all."""
    learning_rates: list[float] | None = None
    """Learning rates of the small form; null takes the comparison's."""
    seeds: int | list[int] | None = None
    """Seeds of the small form, a number or a list; null takes the comparison's."""


class ComparisonConfig(CheckedNumbers):
    """A comparison recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    recipe: str | dict[str, Any]
    """The base: a recipe's name or file, or its settings."""
    settings: dict[str, Any] = Field({})
    """Settings of all runs that differ from the base, nested or as dotted keys."""
    arms: dict[str, dict[str, Any]]
    """Arms by name, each with its settings: the objective with its hyperparameters, the model, the sampler."""
    learning_rates: list[float] | None = None
    """Learning rates; every arm is run at each. null takes the base's."""
    seeds: int | list[int] = SEEDS
    """Number of seeds, counted from the base's seed, or the list of seeds. Arms share the prompts and draws of a
    seed."""
    baseline: str | None = None
    """The arm that the others are compared with; null takes the first."""
    quick: QuickConfig | None = Field(None)
    """The small form (--quick); null is 20 steps, 64 problems, two seeds and the first learning rate."""


def load_comparison(
    name_or_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    objectives: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
    quick: bool = False,
) -> ComparisonPlan:
    """Read a comparison recipe, or make one from a recipe of one run.

    Args:
        name_or_path: a YAML file, a shipped recipe's name, or the directory of a comparison that was begun.
        overrides: `key=value` for all runs.
        objectives: arms of a recipe of one run, each with its own defaults; sapo, gspo and grpo when None.
        arms: those of a comparison recipe to run; all when None.
        learning_rates, seeds, baseline: in place of the recipe's.
        quick: use its small form.

    Raises:
        ConfigError: with one line per mistake.
    """
    begun = Path(name_or_path) / "comparison.yaml"
    path, raw = read_recipe(begun if begun.is_file() else name_or_path)
    name = Path(name_or_path).absolute().name if begun.is_file() else path.stem
    if "arms" in raw or "recipe" in raw:
        if objectives is not None:
            raise ConfigError(f"--objectives makes arms of a recipe of one run; {path} has arms; choose some by --arms")
        config = parse_settings(ComparisonConfig, raw)
    else:
        config = _of_one_run(path, raw, objectives)
        if arms is not None:
            raise ConfigError(f"--arms chooses arms of a comparison; {path} is a recipe of one run; use --objectives")
    given = {"arms": arms, "learning_rates": learning_rates, "seeds": seeds, "baseline": baseline}
    return _plan(f"{name}-quick" if quick else name, config, path, overrides, given, quick)


def comparison_of(
    name: str,
    settings: Mapping[str, Any],
    *,
    objectives: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
    quick: bool = False,
) -> ComparisonPlan:
    """Make a comparison of objectives from the settings of one run, which no file holds.

    Args:
        name: of the comparison.
        settings: of a run; the other arguments are those of `load_comparison`.

    Raises:
        ConfigError: with one line per mistake.
    """
    where = Path(name)
    config = _of_one_run(where, settings, objectives)
    given = {"arms": None, "learning_rates": learning_rates, "seeds": seeds, "baseline": baseline}
    return _plan(f"{name}-quick" if quick else name, config, where, (), given, quick)


def _of_one_run(path: Path, raw: Mapping[str, Any], objectives: Sequence[str] | None) -> ComparisonConfig:
    names = OBJECTIVES if objectives is None else objectives
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ConfigError(f"objectives must differ from each other; got {twice[0]!r} more than once; leave one out")
    arms = {_arm_of(name): {"objective.name": name} for name in names}
    return parse_settings(ComparisonConfig, {"recipe": dict(raw), "arms": arms})


def _arm_of(objective: str) -> str:
    """Return the name of an objective's arm. Of a user's own, module:Class, it is the name that the class has."""
    if not is_plugin(objective):
        return objective
    try:
        return find_objective(objective).name
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _plan(
    name: str,
    config: ComparisonConfig,
    path: Path,
    overrides: Sequence[str],
    given: Mapping[str, Any],
    quick: bool,
) -> ComparisonPlan:
    asked = dict(parse_override(override) for override in overrides)
    _refuse_keys_of_arms(asked, config)
    base_path, base = (path, config.recipe) if isinstance(config.recipe, dict) else _base(path, config.recipe)
    settings = flatten(config.settings)
    small = QuickConfig()
    if quick:
        small = config.quick or _small(resolve_recipe(base, as_overrides(settings), base_path), config.learning_rates)
    shared = {**settings, **flatten(small.settings), **asked}
    for key, option in _RUN_BY_RUN.items():
        if key in shared:
            raise ConfigError(f"{key} is set run by run in a comparison, not for all of them; use {option}")
    resolved = resolve_recipe(base, as_overrides(shared), base_path)
    names = given["arms"] or small.arms or list(config.arms)
    for arm in names:
        if list(names).count(arm) > 1:
            raise ConfigError(f"arms must differ from each other; got {arm!r} more than once; leave one out")
        if arm not in config.arms:
            raise ConfigError(f"unknown arm {arm!r} of {path}{nearest(arm, list(config.arms))}")
    left_out = config.baseline in config.arms and config.baseline not in names
    rates = next(
        (r for r in (given["learning_rates"], small.learning_rates, config.learning_rates) if r is not None),
        [resolved.train.learning_rate],
    )
    seeds = next(s for s in (given["seeds"], small.seeds, config.seeds) if s is not None)
    return ComparisonPlan.of(
        name,
        resolved,
        {arm: config.arms[arm] for arm in names},
        learning_rates=list(rates),
        seeds=_seeds(seeds, resolved),
        baseline=given["baseline"] or (None if left_out else config.baseline),
    )


def _base(path: Path, recipe: str) -> tuple[Path, dict[str, Any]]:
    """Find the base recipe, by name, or by a path from the comparison's own directory or the present one."""
    beside = path.parent / recipe
    found, raw = read_recipe(beside if beside.is_file() else recipe)
    if "arms" in raw:
        raise ConfigError(f"the recipe of a comparison is one of a run; {found} is a comparison; name its own recipe")
    return found, raw


def _small(resolved: RunConfig, learning_rates: list[float] | None) -> QuickConfig:
    """Make a small form for a comparison that has none."""
    steps = min(QUICK_STEPS, resolved.train.steps)
    problems = min(QUICK_PROBLEMS, resolved.eval.problems)
    settings = {"train.steps": steps, "eval.problems": problems, "eval.every": max(1, steps // 2)}
    return QuickConfig(settings=settings, seeds=QUICK_SEEDS, learning_rates=learning_rates and learning_rates[:1])


def _seeds(seeds: int | Sequence[int], base: RunConfig) -> list[int]:
    if not isinstance(seeds, int):
        return list(seeds)
    if seeds < 1:
        raise ConfigError(f"a comparison needs seeds, 1 or more of them; got {seeds}; {SEEDS} is the least to show")
    return [base.seed + i for i in range(seeds)]


def _refuse_keys_of_arms(asked: Mapping[str, Any], config: ComparisonConfig) -> None:
    """Refuse to set for all runs what an arm sets itself: it would have no effect, or make the arms equal."""
    for key in asked:
        for arm, settings in config.arms.items():
            own = next((k for k in flatten(settings) if k == key or k.startswith(f"{key}.")), None)
            if own is not None:
                raise ConfigError(f"{key} cannot be set for all runs: arm {arm} has its own {own}; change the recipe")
