"""The state of a run, and its rollout batch, as JSON: what a checkpoint holds beside weights and optimiser.

Floats survive exactly: Python writes the shortest decimal that reads back as the same number.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sapo.data import Completion, Group, Prompt, RoutedExperts, Score, Status
from sapo.diagnostics.warnings import Health
from sapo.selection import Position
from sapo.training.trainer import UpdateResult


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
        """How many updates old it is after so many of the run."""
        return updates - self.sampled_at


@dataclass
class RunState:
    """Where a run is. Everything that is not weights or optimiser, and survives a kill."""

    step: int = 0
    """Whole steps done."""
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
    selection: dict[str, float] = field(default_factory=dict)
    """Figures of how the present step's batch was chosen, for the step's own line."""
    unfilled: int = 0
    """Groups that teach nothing in the batches so far, where refilling was to leave none."""
    step_updates: list[dict[str, Any]] = field(default_factory=list)
    """Figures of the present step's updates, for the step's own line."""
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For a step whose rollouts are logged: sequence of the step -> what its update measured token by token."""
    evaluated_at: int = -1
    """The step at which the last evaluation was made."""
    old_logprobs: str | None = None
    """engine, trainer or current, once the self-check has decided."""
    start_evaluation: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
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
    """Those of them that the run has gone back to."""
    kept_steps: list[int] = field(default_factory=list)
    """Steps whose checkpoints are kept for good: the last healthy ones before a warning."""
    rollbacks: int = 0
    """How often the run went back to a healthy checkpoint."""
    learning_rate_scale: float = 1.0
    """Factor of the learning rate that the rollbacks have left."""

    @property
    def num_sampled(self) -> int:
        """Rollout batches sampled so far: those of the steps done, the present one, those ahead."""
        return self.step + (self.groups is not None) + len(self.ahead)

    def take_next(self, minibatches: int) -> RolloutBatch:
        """Make the first of the batches ahead the present step's, and return it."""
        batch = self.ahead.pop(0)
        self.groups, self.dropped, self.selection = batch.groups, batch.dropped, dict(batch.figures)
        if age := batch.age(self.step * minibatches + self.update):
            self.selection["rollout/age"] = age
        return batch

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal state; floats survive exactly."""
        fields = dict(self.__dict__)
        fields["groups"] = None if self.groups is None else [group_to_json(g) for g in self.groups]
        fields["dropped"] = [group_to_json(g) for g in self.dropped]
        fields["ahead"] = [
            {**b.__dict__, "groups": [*map(group_to_json, b.groups)], "dropped": [*map(group_to_json, b.dropped)]}
            for b in self.ahead
        ]
        fields["position"] = asdict(self.position)
        fields["health"] = asdict(self.health)
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RunState:
        """The inverse of `to_json`."""
        groups, position = fields["groups"], fields["position"]
        rates = {task: {int(row): rate for row, rate in of.items()} for task, of in position["pass_rates"].items()}
        return cls(
            **{
                **fields,
                "groups": None if groups is None else [group_from_json(g) for g in groups],
                "dropped": [group_from_json(g) for g in fields["dropped"]],
                "ahead": [_batch_from_json(b) for b in fields.get("ahead", [])],
                "position": Position(position["offsets"], rates),
                "health": Health.from_json(fields.get("health", {})),
            }
        )


def group_to_json(group: Group) -> dict[str, Any]:
    """A group as a JSON value, but for the row's further fields: scored and encoded, it needs them no more, and a row
    may hold what JSON does not (dates, decimals) or much of it (tests of programs).

    >>> completion = Completion((2, 0), (-0.1, -0.2), "stop", "2", Score(1.0))
    >>> group = Group(Prompt(1, "t", "1+1=", (1, 2), "2"), (completion,), (0.0,))
    >>> group_from_json(group_to_json(group)) == group
    True
    """
    value = asdict(replace(group, prompt=replace(group.prompt, metadata={})))
    for place, key in ((value, "prompt_experts"), *((c, "experts") for c in value["completions"])):
        if place[key] is not None:
            place[key]["indices"] = base64.b64encode(place[key]["indices"]).decode("ascii")
    return value


def group_from_json(value: dict[str, Any]) -> Group:
    """The inverse of `group_to_json`, also after a trip through text."""
    prompt = {**value["prompt"], **{k: tuple(value["prompt"][k]) for k in ("token_ids", "stop")}}
    return Group(
        prompt=Prompt(**prompt),
        completions=tuple(_completion_from_json(c) for c in value["completions"]),
        advantages=tuple(value["advantages"]),
        shaped_rewards=tuple(value["shaped_rewards"]),
        masked=tuple(value["masked"]),
        prompt_experts=_experts_from_json(value.get("prompt_experts")),
    )


def _batch_from_json(value: dict[str, Any]) -> RolloutBatch:
    groups = {k: [group_from_json(g) for g in value[k]] for k in ("groups", "dropped")}
    return RolloutBatch(**{**value, **groups})


def _completion_from_json(value: dict[str, Any]) -> Completion:
    score = value["score"]
    return Completion(
        token_ids=tuple(value["token_ids"]),
        logprobs=tuple(value["logprobs"]),
        finish_reason=value["finish_reason"],
        text=value["text"],
        score=Score(**{**score, "status": Status(score["status"])}),
        old_logprobs=tuple(value["old_logprobs"]),
        reference_logprobs=tuple(value["reference_logprobs"]),
        experts=_experts_from_json(value.get("experts")),
    )


def _experts_from_json(value: dict[str, Any] | None) -> RoutedExperts | None:
    return None if value is None else RoutedExperts(**{**value, "indices": base64.b64decode(value["indices"])})


def token_gates(
    result: UpdateResult, update: int, minibatches: int, samples: int, on_policy: bool
) -> dict[str, dict[str, Any]]:
    """What an update measured token by token, by sequence of the step.

    Args:
        update: which of the step's `minibatches`.
        samples: per prompt.
        on_policy: the update was made at the weights that sampled; the first of a stale batch is not.
    """
    lengths = result.sequence_M.bincount().tolist()
    measured = {"log_ratio": result.log_ratio_M, "gate_weight": result.weight_M, "entropy": result.entropy_M}
    by_name = {name: values.split(lengths) for name, values in measured.items() if values is not None}
    gates: dict[str, dict[str, Any]] = {}
    for number, sequence in enumerate(result.sequence_ids):
        group, sample = divmod(sequence, samples)
        place = (update + group * minibatches) * samples + sample  # the inverse of split_minibatches
        own = {name: parts[number].tolist() for name, parts in by_name.items()}
        gates[str(place)] = {"update": update, "on_policy": on_policy, **own}
    return gates


def rollout_records(
    groups: Sequence[Group],
    gates: dict[str, dict[str, Any]],
    *,
    sampler_is_old: bool,
    dropped: Sequence[Group] = (),
) -> Iterator[dict[str, Any]]:
    """One record per completion for rollouts/: text, tokens, reward, advantage, log-probabilities, gates.

    What a completion does not have (a shaped reward, a mask, further figures of its verifier) is left out.

    Args:
        gates: sequence number in the step -> update, log-ratios, gate weights and entropies; a completion whose group
            taught nothing has none, and its record leaves them out.
        sampler_is_old: log pi_old is the sampler's; otherwise it is left out where the trainer computed none.
        dropped: groups that were sampled and left the batch; they come last and say so.
    """
    sequence = 0
    for place, group in enumerate((*groups, *dropped)):
        for sample, (completion, advantage) in enumerate(zip(group.completions, group.advantages, strict=True)):
            old = completion.old_logprobs or (completion.logprobs if sampler_is_old else ())
            yield {
                "prompt_id": group.prompt.id,
                "task": group.prompt.task,
                "prompt": group.prompt.text,
                "answer": group.prompt.answer,
                "sample": sample,
                "text": completion.text,
                "reward": completion.score.reward,
                **({"shaped_reward": group.shaped_rewards[sample]} if group.shaped_rewards else {}),
                **({"masked": group.masked[sample]} if group.masked else {}),
                **({"dropped": True} if place >= len(groups) else {}),
                "status": completion.score.status.value,
                "detail": completion.score.detail,
                **({"figures": dict(completion.score.figures)} if completion.score.figures else {}),
                "advantage": advantage,
                "finish_reason": completion.finish_reason,
                "prompt_token_ids": list(group.prompt.token_ids),
                "token_ids": list(completion.token_ids),
                "logprobs": list(completion.logprobs),
                **({"old_logprobs": list(old)} if old else {}),
                **gates.get(str(sequence), {}),
            }
            sequence += 1
