"""Arms: runs that differ in their seed alone are drawn as one, under a name that tells them from the others.

In a comparison an arm at another learning rate is another `Arm` here, of the same colour and name: each learning rate
has axes of its own, so that a figure has as many colours as the comparison has arms.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.report.runs import ReportedRun
from sapo.utils.reading import read_yaml
from sapo.workflows.comparing.plan import format_rate

# Settings of where and how a run was made. They do not identify it.
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
"""Short names of settings in a label; an empty name shows the value alone."""

MOST_IN_A_LABEL = 3
"""Largest number of settings in a label; runs that differ in more are called by their names."""

# Sections that one of their settings identifies: the others follow from it, or the run's name has them.
TOLD_BY = {"model.coldstart.": "model.coldstart.architecture"}


@dataclass(frozen=True)
class Arm:
    """Runs of one setting, one for each seed.

    >>> from pathlib import Path
    >>> run = ReportedRun("q", Path("runs/q"), {"seed": 3, "objective": {"name": "sapo"}}, (), None)
    >>> Arm("sapo", (run,)).seeds
    (3,)
    """

    label: str
    runs: tuple[ReportedRun, ...]
    color: int = 0
    """Index into the palette."""
    rate: str = ""
    """Its learning rate, where a comparison has several: each rate has axes of its own."""
    legend: str = ""
    """Its name in figures, where that is shorter than its label."""
    place: int = 0
    """Place of its learning rate among those of arms of its colour: figures tell them by dash, then by shade."""

    @property
    def name(self) -> str:
        """Return the name that figures use."""
        return self.legend or self.label

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Return the seed of each run."""
        return tuple(run.setting("seed") for run in self.runs)

    @property
    def objective(self) -> dict[str, Any]:
        """Return the name and settings of the objective."""
        found: dict[str, Any] = self.runs[0].settings["objective"]
        return found


def group_runs(runs: Sequence[ReportedRun]) -> list[Arm]:
    """Group runs into arms, in the order of their first runs; those of one comparison in the order of its plan."""
    groups: dict[str, list[ReportedRun]] = defaultdict(list)
    for run in runs:
        groups[_identity(run)].append(run)
    compared = [_in_comparison(members[0]) for members in groups.values()]
    if None not in compared and len({of[0] for of in compared if of is not None}) == 1:
        return _of_comparison(list(groups.values()))
    flat = [flatten(members[0].settings) for members in groups.values()]
    differing = [key for key in _differing(flat) if key != "model.routing_replay"]  # the objective's name has it
    labels = [_label(members[0], own, differing) for members, own in zip(groups.values(), flat, strict=True)]
    if any(len(_told(own, differing)) > MOST_IN_A_LABEL for own in flat):
        labels = [
            label if _in_comparison(members[0]) is not None else _by_name(members, own, differing)
            for label, members, own in zip(labels, groups.values(), flat, strict=True)
        ]
    arms: list[Arm] = []
    colors: dict[str, int] = {}  # an arm of several comparisons or learning rates has one colour
    for label, members in zip(labels, groups.values(), strict=True):
        of = _in_comparison(members[0])
        color = colors.setdefault(f"comparison {of[1]}" if of is not None else f"run {label} {len(arms)}", len(colors))
        if labels.count(label) > 1:
            label = f"{label} ({members[0].name if of is None else of[0].name})"
        arms.append(Arm(label, tuple(members), color, place=sum(arm.color == color for arm in arms)))
    return arms


def _of_comparison(groups: Sequence[list[ReportedRun]]) -> list[Arm]:
    """Make the arms of one comparison: a colour for each arm, axes for each learning rate."""
    found = [(of, members) for members in groups if (of := _in_comparison(members[0])) is not None]
    planned, rates = plan_of(found[0][0][0])
    planned += sorted({arm for (_, arm, _), _ in found} - set(planned))
    rates += sorted({rate for (_, _, rate), _ in found} - set(rates), key=float)
    several = len({rate for (_, _, rate), _ in found}) > 1
    arms = [
        Arm(
            f"{arm}, lr {rate}",
            tuple(sorted(members, key=lambda run: (run.setting("seed") or 0, run.name))),
            planned.index(arm),
            f"lr {rate}" if several else "",
            arm,
        )
        for (_, arm, rate), members in found
    ]
    order = {f"{arm}, lr {rate}": (rates.index(rate), planned.index(arm)) for (_, arm, rate), _ in found}
    return sorted(arms, key=lambda arm: order[arm.label])


def plan_of(comparison: Path) -> tuple[list[str], list[str]]:
    """Read the names of a comparison's arms and its learning rates as its runs are named, both in their order. Both are
    empty where the plan cannot be read."""
    try:
        plan = read_yaml(comparison / "comparison.yaml")
        return [str(arm) for arm in plan["arms"]], [format_rate(float(rate)) for rate in plan["learning_rates"]]
    except (KeyError, TypeError, ValueError):  # of which a ConfigError is one
        return [], []


def by_rate(arms: Sequence[Arm]) -> list[tuple[str, list[Arm]]]:
    """Group arms that share axes: in a comparison of several learning rates those of one rate, elsewhere all.

    >>> [(rate, [arm.name for arm in own]) for rate, own in by_rate([Arm("a", ()), Arm("b", ())])]
    [('', ['a', 'b'])]
    """
    groups: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        groups[arm.rate].append(arm)
    return list(groups.items())


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that identify a run, under dotted keys.

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


def _identity(run: ReportedRun) -> str:
    if (of := _in_comparison(run)) is not None:
        return "\0".join(map(str, of))
    return json.dumps(flatten(run.settings), sort_keys=True, default=str)


def _in_comparison(run: ReportedRun) -> tuple[Path, str, str] | None:
    """Return the comparison, arm and learning rate that a directory's name gives, or None where no comparison made
    it."""
    parent = run.path.resolve().parent
    found = _OF_A_COMPARISON.fullmatch(run.path.resolve().name)
    if found is None or parent.name != "runs" or not (parent.parent / "comparison.yaml").is_file():
        return None
    return parent.parent, found["arm"], found["rate"]


def arm_in_comparison(arm: Arm) -> str:
    """Return the name that an arm has in its comparison; its label where no comparison made it."""
    of = _in_comparison(arm.runs[0])
    return arm.label if of is None else of[1]


def _differing(flat: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between arms; settings of an objective are compared among its own arms."""
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


def _label(run: ReportedRun, flat: dict[str, Any], differing: Sequence[str]) -> str:
    if (of := _in_comparison(run)) is not None:
        return f"{of[1]}, lr {of[2]}"
    parts = [objective_of(run)]
    for key in _told(flat, differing):
        called = SHORT.get(key, key.rpartition(".")[2])
        parts.append(_tasks(run) if key == "tasks" else f"{called} {_brief(flat[key], key)}".strip())
    return ", ".join(parts)


def _told(flat: dict[str, Any], differing: Sequence[str]) -> list[str]:
    """Return the settings that tell an arm from the others, the most compared first; "tasks" stands for all of its
    tasks."""
    own = [key for key in differing if key in flat]
    for section, key in TOLD_BY.items():
        own = [k for k in own if not k.startswith(section) or k == key or key not in differing]
    own = [k for k in own if not k.startswith("tasks.")]
    # Temperatures and rates first: they are compared the most.
    own.sort(key=lambda k: (not k.startswith("objective."), k != "train.learning_rate", not k.startswith("model.")))
    return own + ["tasks"] * any(k.startswith("tasks.") for k in differing)


def _by_name(members: Sequence[ReportedRun], flat: dict[str, Any], differing: Sequence[str]) -> str:
    """Return a label for runs that differ in too many settings: the first run's name, its objective and learning
    rate."""
    more = f" and {len(members) - 1} more" if len(members) > 1 else ""
    rate = [key for key in differing if key == "train.learning_rate" and key in flat]
    return ", ".join(
        [f"{members[0].name}{more}: {objective_of(members[0])}", *(f"lr {_brief(flat[k], k)}" for k in rate)]
    )


def objective_of(run: ReportedRun) -> str:
    """Return the objective's name, with the kind of routing replay that was used: GRPO-R2, GRPO-R3."""
    name = str(run.settings["objective"].get("name", "?"))
    # One of the user's own, module:Class, by the name its class has.
    name = str(run.setting("provenance.objective") or name.rpartition(":")[2]) if ":" in name else name.upper()
    setting = run.setting("model.routing_replay")
    if not setting:
        return name
    kinds = [setting, run.setting("provenance.routing_replay")]
    kinds += [record.get("routing_replay") for record in run.of_kind("self_check")]
    kind = next((kind for kind in kinds if kind in ("R2", "R3")), None)
    return f"{name} with routing replay" if kind is None else f"{name}-{kind}"


def _tasks(run: ReportedRun) -> str:
    """Return the tasks of a run under the names of its evaluations, or their number where there are several."""
    names = list(dict.fromkeys(str(r["task"]) for r in run.of_kind("eval")))
    names = names or [
        str(t.get("label") or t.get("name")) for t in run.settings.get("tasks", []) if isinstance(t, dict)
    ]
    return names[0] if len(names) == 1 else f"{len(names)} tasks"


def _brief(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return format_rate(value) if key.endswith("learning_rate") and value > 0 else f"{value:g}"
    text = str(value)
    return text if len(text) <= 32 else f"…{text[-31:]}"
