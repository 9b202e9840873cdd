"""Arms: runs that differ in nothing but their seed are drawn as one, and named by what tells them from the others."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapo.report.runs import Run

# Where and how a run was made, not what it is.
BESIDE_THE_POINT = (
    *("seed", "run_dir", "threads", "device", "provenance"),
    *("log", "checkpoint", "eval", "diagnostics", "profile"),
)

_OF_A_COMPARISON = re.compile(r"(?P<arm>.+)-lr(?P<rate>[^-]+(?:-\d+)?)-seed(?P<seed>\d+)")

SHORT = {
    "train.learning_rate": "lr",
    "model.coldstart.architecture": "",
    "train.minibatches": "minibatches",
    "train.steps": "steps",
    "model.path": "",
}
"""How settings are called in a label; an empty one leaves its value to speak for itself."""

MOST_IN_A_LABEL = 3

# Sections that are told by one of their settings: the others follow from it, or are told by the run's name.
TOLD_BY = {"model.coldstart.": "model.coldstart.architecture"}


@dataclass(frozen=True)
class Arm:
    """Runs of one setting, their seeds side by side.

    >>> from pathlib import Path
    >>> run = Run("q", Path("runs/q"), {"seed": 3, "objective": {"name": "sapo"}}, (), None)
    >>> Arm("sapo", (run,)).seeds
    (3,)
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of each run."""
        return tuple(run.setting("seed") for run in self.runs)

    @property
    def objective(self) -> dict[str, Any]:
        """Name and settings of the objective."""
        found: dict[str, Any] = self.runs[0].settings["objective"]
        return found


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order in which their first runs come."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[_identity(run)].append(run)
    flat = [flatten(members[0].settings) for members in groups.values()]
    differing = _differing(flat)
    labels = [_label(members[0], own, differing) for members, own in zip(groups.values(), flat, strict=True)]
    arms = []
    for label, members in zip(labels, groups.values(), strict=True):
        clear = labels.count(label) == 1
        arms.append(Arm(label if clear else f"{label} ({members[0].name})", tuple(members)))
    return arms


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of what makes a run what it is.

    >>> flatten({"seed": 1, "train": {"steps": 5}, "tasks": [{"name": "add"}]})
    {'train.steps': 5, 'tasks.0.name': 'add'}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if not prefix and key in BESIDE_THE_POINT:
            continue
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _identity(run: Run) -> str:
    if (name := _name_in_comparison(run)) is not None:
        return f"{run.path.resolve().parent}\0{name}"
    return json.dumps(flatten(run.settings), sort_keys=True, default=str)


def _name_in_comparison(run: Run) -> str | None:
    """Arm and learning rate by the directory's name, where a comparison gave it."""
    parent = run.path.resolve().parent
    found = _OF_A_COMPARISON.fullmatch(run.path.resolve().name)
    if found is None or parent.name != "runs" or not (parent.parent / "comparison.yaml").is_file():
        return None
    return f"{found['arm']}, lr {found['rate']}"


def _differing(flat: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all arms; the objective's own only among arms of that objective."""
    keys = dict.fromkeys(key for own in flat for key in own)
    found = []
    for key in keys:
        sharing = flat
        if key.startswith("objective.") and key != "objective.name":
            sharing = [own for own in flat if key in own]
        values = {json.dumps(own.get(key), sort_keys=True, default=str) for own in sharing}
        if len(values) > 1 and key != "objective.name":
            found.append(key)
    return found


def _label(run: Run, flat: dict[str, Any], differing: Sequence[str]) -> str:
    if (name := _name_in_comparison(run)) is not None:
        return name
    parts = [str(flat.get("objective.name", "?")).upper()]
    own = [key for key in differing if key in flat]
    for section, key in TOLD_BY.items():
        own = [k for k in own if not k.startswith(section) or k == key or key not in differing]
    tasks = any(k.startswith("tasks.") for k in differing)
    own = [k for k in own if not k.startswith("tasks.")]
    # Temperatures and rates first: they are what one compares.
    own.sort(key=lambda k: (not k.startswith("objective."), k != "train.learning_rate", not k.startswith("model.")))
    for key in own[: MOST_IN_A_LABEL - tasks]:
        called = SHORT.get(key, key.rpartition(".")[2])
        parts.append(f"{called} {_brief(flat[key])}".strip())
    if tasks:
        parts.append(_tasks(run))
    if len(own) > MOST_IN_A_LABEL - tasks:
        parts.append("…")
    return ", ".join(parts)


def _tasks(run: Run) -> str:
    """The tasks of a run by the names its evaluations have, in brief."""
    names = list(dict.fromkeys(str(r["task"]) for r in run.of_kind("eval")))
    names = names or [
        str(t.get("label") or t.get("name")) for t in run.settings.get("tasks", []) if isinstance(t, dict)
    ]
    return names[0] if len(names) == 1 else f"{len(names)} tasks"


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 32 else f"…{text[-31:]}"
