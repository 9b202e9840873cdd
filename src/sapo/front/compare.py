"""`sapo.compare`: objectives side by side, from what Python gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sapo.config import RunConfig
from sapo.config.recipes import read_recipe
from sapo.errors import ConfigError
from sapo.front.comparison_display import ComparisonDisplay, show_results
from sapo.front.settings import as_changes
from sapo.front.train import make_config
from sapo.tasks.verifiers.in_process import PREFIX, shown
from sapo.workflows import comparing
from sapo.workflows.comparing import ComparedRuns, ComparisonPlan, load_comparison
from sapo.workflows.comparing.comparison import ComparisonListener
from sapo.workflows.comparing.config import comparison_of
from sapo.workflows.comparing.plan import as_overrides


def compare(
    recipe: ComparisonPlan | str | Path | Mapping[str, Any] | RunConfig | None = None,
    directory: str | Path | None = None,
    *,
    model: Any = None,
    tasks: Any = None,
    rewards: Any = None,
    rows: Any = None,
    objectives: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
    quick: bool = False,
    jobs: int | None = None,
    progress: bool = True,
    listener: ComparisonListener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **overrides: Any,
) -> ComparedRuns:
    """Compare objectives over learning rates and seeds; the same call resumes a comparison that was stopped.

    Args:
        recipe: of a comparison or of one run, by name, file or settings; a plan of `load_comparison`; the directory of
            a comparison; None for defaults, as in `sapo.train`.
        directory: where it is kept; comparisons/NAME when None.
        model, tasks, rewards, rows: see `sapo.train`. Its runs are processes of their own, so rewards and tasks must be
            ones that these can import.
        objectives: arms of a recipe of one run; sapo, gspo and grpo when None.
        arms: those of a comparison recipe to run; all when None.
        learning_rates, seeds, baseline: in place of the recipe's.
        quick: use the small form.
        jobs: runs at a time; one for each GPU, else as many as the cores allow, when None.
        progress: show the runs as they go on, and the table at the end; not where a listener is given.
        listener: told of all there is to tell, in place of the progress.
        should_stop: when it returns true, active runs are saved and stopped.
        overrides: settings of all runs by keyword, see `sapo.train`.

    Raises:
        ConfigError, ModelError, TaskError: it cannot be run as asked, or an argument is unknown.
        RunProcessError: the process of a run ended without a result; the others were saved.
    """
    plan = recipe if isinstance(recipe, ComparisonPlan) else None
    if plan is None:
        given = {"objectives": objectives, "learning_rates": learning_rates, "seeds": seeds, "baseline": baseline}
        objects = {"model": model, "tasks": tasks, "rewards": rewards, "rows": rows}
        plan = _plan(recipe, objects, overrides, arms=arms, quick=quick, **given)
    if listener is not None or not progress:
        return comparing.compare(plan, directory, jobs=jobs, listener=listener, should_stop=should_stop)
    console = Console(emoji=False)
    with ComparisonDisplay(console, plan) as display:
        compared = comparing.compare(plan, directory, jobs=jobs, listener=display, should_stop=should_stop)
    show_results(compared.results, console)
    return compared


def _plan(recipe: Any, objects: Mapping[str, Any], overrides: Mapping[str, Any], **given: Any) -> ComparisonPlan:
    changes = as_changes(overrides, compare)
    if isinstance(recipe, str | Path) and all(value is None for value in objects.values()):
        return load_comparison(recipe, as_overrides(dict(changes)), **given)
    if isinstance(recipe, str | Path) and {"arms", "recipe"} & set(read_recipe(recipe)[1]):
        asked = next(name for name, value in objects.items() if value is not None)
        raise ConfigError(
            f"{recipe} is a comparison with its own model and tasks; got {asked}=; give a recipe of one run and "
            "objectives=[...], or settings by keyword"
        )
    if given.pop("arms") is not None:
        raise ConfigError("arms chooses arms of a comparison's recipe; got settings of one run; use objectives")
    config = make_config(recipe, **objects, overrides=overrides)
    settings = config.model_dump(mode="json", exclude={"run_dir", "provenance"})
    _refuse_of_this_process(settings["tasks"])
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "python"
    return comparison_of(name, settings, **given)


def _refuse_of_this_process(tasks: Any) -> None:
    """Refuse rewards and tasks that only this process has.

    Raises:
        ConfigError: there is one.
    """
    text = json.dumps(tasks)
    if PREFIX in text:
        name = shown(text.split(PREFIX, 1)[1].split('"', 1)[0])
        raise ConfigError(
            f"the runs of a comparison are processes of their own, and {name!r} is of this Python session alone; put "
            "it in a module, from which they can import it"
        )
