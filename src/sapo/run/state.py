"""The state of a run, and its rollout batches: what a checkpoint holds beside weights and optimizer.

Token data is kept apart as flat arrays (batches.safetensors), all else as JSON (state.json). Floats survive exactly:
Python writes the shortest decimal that reads back as the same number, and arrays go as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sapo.data import Group
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.serialisation import group_from_json, group_to_json
from sapo.diagnostics.warnings import Health
from sapo.errors import CheckpointError
from sapo.rollout.selection import Position
from sapo.run.line import Line
from sapo.utils.text import first_line


@dataclass(frozen=True)
class RolloutBatch:
    """A rollout batch, from its sampling to the step that trains on it.

    >>> RolloutBatch(groups=[], dropped=[], figures={"groups/refill_rounds": 1}, sampled_at=8).age(12)
    4
    """

    groups: list[Group]
    """Scored, with advantages and log pi_old."""
    dropped: list[Group]
    """Sampled with them and not trained on."""
    figures: dict[str, float]
    """How the batch was chosen."""
    sampled_at: int
    """Updates of the run before it was sampled, skipped ones counted."""

    def age(self, updates: int) -> int:
        """Return how many updates old it is after so many of the run."""
        return updates - self.sampled_at


@dataclass
class RunState:
    """All of a run that is not weights or optimizer and must survive a kill."""

    step: int = 0
    """Whole steps done."""
    run: str | None = None
    """Name of the run (`InputRecord.run`), by which a checkpoint of another run is told; None in earlier versions."""
    update: int = 0
    """Updates done in the present step."""
    groups: list[Group] | None = None
    """The present step's rollout batch, scored, with advantages and log pi_old; None before it is sampled."""
    dropped: list[Group] = field(default_factory=list)
    """Groups of the present step that were sampled and are not trained on."""
    ahead: list[RolloutBatch] = field(default_factory=list)
    """Batches sampled for later steps, the next one first: under staleness the run keeps these, and not old weights."""
    position: Position = field(default_factory=Position)
    """Where the next batch's prompts begin."""
    line: Line = field(default_factory=Line)
    """For the free schedule: the groups that wait, and the prompts that are being drawn."""
    selection: dict[str, float] = field(default_factory=dict)
    """Figures of how the present step's batch was chosen, for the step's own line."""
    unfilled: int = 0
    """Zero-variance groups in the batches so far, where refilling was to leave none."""
    step_updates: list[dict[str, Any]] = field(default_factory=list)
    """Figures of the present step's updates, for the step's own line."""
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For a step whose rollouts are logged: sequence of the step -> what its update measured; token by token in arrays.
    """
    evaluated_at: int = -1
    """The step at which the last evaluation was made."""
    old_logprobs: str | None = None
    """engine, trainer or current, once the self-check has decided."""
    start_evaluation: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
    judged: list[float] = field(default_factory=list)
    """The figure of train.stop_when at each evaluation since the rule has looked at this figure."""
    judged_metric: str | None = None
    """Name of that figure."""
    tokens: dict[str, int] = field(default_factory=lambda: {"generated": 0, "trained": 0})
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, over all the run's processes."""
    metrics_bytes: int = 0
    health: Health = field(default_factory=Health)
    """What the rules of early warning remember."""
    collapse: dict[str, Any] | None = None
    """A collapse found in the present step, until the step's end answers it."""
    healthy_steps: list[int] = field(default_factory=list)
    """Steps of the last checkpoints that were written by schedule and have been proven by the step after them."""
    candidate_step: int | None = None
    """The step of a checkpoint that the present step will prove healthy, or not."""
    tried_steps: list[int] = field(default_factory=list)
    """Those of the healthy steps that a rollback has used."""
    kept_steps: list[int] = field(default_factory=list)
    """Steps whose checkpoints are kept for good: the last healthy ones before a warning."""
    rollbacks: int = 0
    """Number of rollbacks to a healthy checkpoint."""
    learning_rate_scale: float = 1.0
    """Factor of the learning rate that the rollbacks have left."""

    @property
    def num_sampled(self) -> int:
        """Count the rollout batches sampled so far: those of the steps done, the present one, those ahead."""
        return self.step + (self.groups is not None) + len(self.ahead)

    def waiting(self) -> Iterator[Group]:
        """Yield the groups that are sampled and in no finished step."""
        yield from self.groups or ()
        for batch in self.ahead:
            yield from batch.groups
        yield from self.line.ready

    def take_next(self, minibatches: int) -> RolloutBatch:
        """Make the first of the batches ahead the present step's, and return it."""
        batch = self.ahead.pop(0)
        self.groups, self.dropped, self.selection = batch.groups, batch.dropped, dict(batch.figures)
        if age := batch.age(self.step * minibatches + self.update):
            self.selection["rollout/age"] = age
        return batch

    def serialise(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return a JSON value without token data, and the token data as flat arrays; `deserialise` is the inverse."""
        arrays = FlatArrays()
        fields = {
            **_batch_to_json(vars(self), arrays),
            "ahead": [_batch_to_json(vars(batch), arrays) for batch in self.ahead],
            "gates": {sequence: _without_arrays(gate, arrays) for sequence, gate in self.gates.items()},
            "line": self.line.to_json(arrays),
            "position": asdict(self.position),
            "health": asdict(self.health),
        }
        return fields, arrays.joined()

    @classmethod
    def deserialise(cls, fields: dict[str, Any], joined: Mapping[str, np.ndarray]) -> RunState:
        """Return the state that `serialise` was called on; the JSON value may have been through text.

        Raises:
            CheckpointError: the arrays are not those of this JSON value, or it is of another version or damaged.
        """
        try:
            return cls._read(fields, joined)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise CheckpointError(
                f"state.json must be the state of a run, of this version of the package; got {reason}"
            ) from error

    @classmethod
    def _read(cls, fields: dict[str, Any], joined: Mapping[str, np.ndarray]) -> RunState:
        for name, kinds in _KINDS.items():
            if not isinstance(value := fields.get(name, kinds[0]()), kinds) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r:.60}")
        arrays, position = ArrayReader(joined), fields["position"]
        rates = {task: {int(row): rate for row, rate in of.items()} for task, of in position["pass_rates"].items()}
        return cls(
            **{
                **_batch_from_json(fields, arrays),
                "ahead": [RolloutBatch(**_batch_from_json(batch, arrays)) for batch in fields.get("ahead", [])],
                "gates": {sequence: _with_arrays(gate, arrays) for sequence, gate in fields["gates"].items()},
                "line": Line.from_json(fields["line"], arrays) if "line" in fields else Line(),
                "position": Position(position["offsets"], rates),
                "health": Health.from_json(fields.get("health", {})),
            }
        )


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "update", "unfilled", "evaluated_at", "metrics_bytes", "rollbacks"), (int,)),
    **dict.fromkeys(("selection", "gates", "tokens", "seconds", "position", "line"), (dict,)),
    **dict.fromkeys(
        ("ahead", "dropped", "step_updates", "healthy_steps", "tried_steps", "kept_steps", "judged"), (list,)
    ),
    **dict.fromkeys(("run", "old_logprobs", "judged_metric"), (str, type(None))),
    **dict.fromkeys(("start_evaluation", "last_evaluation", "collapse"), (dict, type(None))),
    "learning_rate_scale": (float, int),
    "groups": (list, type(None)),
    "candidate_step": (int, type(None)),
}
"""Types of a state's JSON values."""


def _batch_to_json(batch: Mapping[str, Any], arrays: FlatArrays) -> dict[str, Any]:
    """Replace the groups of a batch, or of the present step, by JSON values."""
    groups, dropped = (
        None if found is None else [group_to_json(g, arrays) for g in found]
        for found in (batch["groups"], batch["dropped"])
    )
    return {**batch, "groups": groups, "dropped": dropped}


def _batch_from_json(value: Mapping[str, Any], arrays: ArrayReader) -> dict[str, Any]:
    groups, dropped = (
        None if found is None else [group_from_json(g, arrays) for g in found]
        for found in (value["groups"], value["dropped"])
    )
    return {**value, "groups": groups, "dropped": dropped}


def _without_arrays(gate: dict[str, Any], arrays: FlatArrays) -> dict[str, Any]:
    names = [name for name, value in gate.items() if isinstance(value, np.ndarray)]
    for name in names:
        arrays.put(f"gates.{name}", gate[name])
    return {**{k: v for k, v in gate.items() if k not in names}, "arrays": names}


def _with_arrays(gate: dict[str, Any], arrays: ArrayReader) -> dict[str, Any]:
    """Undo `_without_arrays`; checkpoints of earlier versions hold lists in the JSON value."""
    names = gate.get("arrays", [])
    return {k: v for k, v in gate.items() if k != "arrays"} | {name: arrays.take(f"gates.{name}") for name in names}
