"""The line of the free schedule: which prompts are to be drawn, and which finished groups wait for a step.

Prompts have numbers 0, 1, ... in the order of the fixed schedule. Each is at any moment in one place of `Line`, or in a
step, or not begun; so none is lost or trained on twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapo.data import Group
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.serialisation import group_from_json, group_to_json


@dataclass(frozen=True)
class Line:
    """Where the prompts of a run are that are not in a step, as a checkpoint has it.

    >>> Line(again=(3,), unfinished=(4, 5), next=6).resumed()
    Line(ready=(), again=(4, 5, 3), unfinished=(), next=6, discarded=0, redrawn=2)
    """

    ready: tuple[Group, ...] = ()
    """Finished groups, in the order in which a step takes them."""
    again: tuple[int, ...] = ()
    """Prompts to be drawn first: their groups became too old."""
    unfinished: tuple[int, ...] = ()
    """Prompts that are being drawn."""
    next: int = 0
    """The first prompt that was never begun."""
    discarded: int = 0
    """Groups that became too old, so far."""
    redrawn: int = 0
    """Prompts that were being drawn when the run was stopped or killed, so far: they are drawn anew."""

    def resumed(self) -> Line:
        """Return the line of a run that goes on from here, where nobody draws."""
        again, redrawn = self.unfinished + self.again, self.redrawn + len(self.unfinished)
        return Line(self.ready, again, (), self.next, self.discarded, redrawn)

    def to_json(self, arrays: FlatArrays) -> dict[str, Any]:
        """Return a JSON value, and put the token data into `arrays`; `from_json` is the inverse."""
        return {**vars(self), "ready": [group_to_json(group, arrays) for group in self.ready]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], arrays: ArrayReader) -> Line:
        """Return what `to_json` was called on; the JSON value may have been through text."""
        places = {name: tuple(value[name]) for name in ("again", "unfinished")}
        return cls(**{**value, **places, "ready": tuple(group_from_json(g, arrays) for g in value["ready"])})


@dataclass(frozen=True)
class Room:
    """How many prompts may be begun, so that each can still be young enough when its turn comes.

    >>> room = Room(prompts=4, minibatches=2, bound=2, steps=10)
    >>> room.free(step=1, version=0, waiting=0), room.free(step=1, version=2, waiting=4), room.free(9, 18, 0)
    (4, 4, 4)
    >>> Room(prompts=4, minibatches=2, bound=1, steps=10).free(step=1, version=0, waiting=0)
    0
    """

    prompts: int
    """Of a step."""
    minibatches: int
    """Updates of a step."""
    bound: int
    """Largest staleness in updates."""
    steps: int
    """Of the run: nothing is begun for later ones."""

    def free(self, step: int, version: int, waiting: int) -> int:
        """Return how many prompts may be begun.

        Args:
            step: the next that takes groups up, 0, 1, ...
            version: updates made by the newest weights.
            waiting: groups before them in the line.
        """
        ahead = (self.bound + version - step * self.minibatches) // self.minibatches + 1
        return max(0, self.prompts * min(ahead, self.steps - step) - waiting)


def oldest(group: Group) -> int:
    """Return the version of the oldest weights that drew a token of a group."""
    return min(version for completion in group.completions for _, version in completion.versions)


def staleness_record(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Return how many tokens and groups of a batch are how many updates old: the line of kind "staleness".

    A group is as old as its oldest token.

    Args:
        version: updates made before the batch's first one.

    >>> from sapo.data import Completion, Prompt
    >>> group = Group(Prompt(0, "t", ""), (Completion((5, 6, 7), (-1.0,) * 3, "stop", versions=((1, 3), (2, 4))),))
    >>> staleness_record([group], version=4)
    {'version': 4, 'staleness': [0, 1], 'tokens': [2, 1], 'groups': [0, 1]}
    """
    tokens: dict[int, int] = {}
    for count, drawn_at in (run for g in groups for c in g.completions for run in c.versions):
        tokens[version - drawn_at] = tokens.get(version - drawn_at, 0) + count
    ages = [version - oldest(group) for group in groups]
    found = sorted(tokens)
    return {
        "version": version,
        "staleness": found,
        "tokens": [tokens[age] for age in found],
        "groups": [ages.count(age) for age in found],
    }


def staleness_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean over tokens and the largest of a record's staleness, for the step's own line."""
    ages, tokens = np.array(record["staleness"]), np.array(record["tokens"])
    mean = float((ages * tokens).sum() / tokens.sum())
    return {"rollout/staleness_mean": mean, "rollout/staleness_max": int(ages.max())}
