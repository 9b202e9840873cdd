"""Choose the prompts of a step, and which of their groups are trained on.

Without options a step samples the mixture's prompts and trains on all their groups. Three options change that.

- zero_variance=drop: zero-variance groups leave the batch (DAPO's filter, https://arxiv.org/abs/2503.14476,
  section 3.2, without its resampling).
- zero_variance=refill: their places go to further prompts, drawn in rounds at the same weights until the batch is full
  (DAPO's dynamic sampling). Departure: the paper draws whole batches from one source until there are enough. Here
  each round draws as many prompts of each task as that task has free places. So no group with variance is thrown away,
  and the batch keeps the mixture's exact ratio. After the last round, zero-variance groups fill what is left.
- A curriculum skips rows (curriculum.py).

The prompts of a task are numbered, and every number is used once, in order. How many prompts the mixture has used is a
pure function of the step. `Position` adds up what refills used and the curriculum skipped beyond that. It is replaced
only when the batch of a step is whole: a step that is interrupted while it samples starts again with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sapo.config import RolloutConfig
from sapo.data import Group, Prompt
from sapo.rollout.curriculum import Curriculum
from sapo.tasks import FiniteTask, Task, prompts_for_step

SampleGroups = Callable[[list[Prompt]], list[Group]]
"""Samples and scores a group for each prompt, in order."""


@dataclass(frozen=True)
class Position:
    """The position of a run in its prompts, beyond what follows from the step.

    >>> Position(offsets={"sums": 3}, pass_rates={"sums": {17: 0.5}}).offsets["sums"]
    3
    """

    offsets: Mapping[str, int] = field(default_factory=dict)
    """Prompts of each task that were used or skipped beyond the mixture's own count."""
    pass_rates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Running pass rate of each row seen, by task with a curriculum."""


@dataclass(frozen=True)
class Selection:
    """The groups that a step sampled, those it trains on and those it drops.

    >>> from sapo.data import Completion, Score
    >>> good, bad = (Completion((1,), (-0.1,), "stop", score=Score(reward)) for reward in (1.0, 0.0))
    >>> kept, flat = Group(Prompt(0, "t", ""), (good, bad)), Group(Prompt(1, "t", ""), (bad, bad))
    >>> Selection([kept], [flat], Position(), refill_rounds=0, unfilled=0, passed_over={}).dropped == [flat]
    True
    """

    groups: list[Group]
    """The batch, task by task, each in the order sampled."""
    dropped: list[Group]
    """Groups that were sampled and scored but are not trained on."""
    position: Position
    """The position at which the next step begins."""
    refill_rounds: int
    """Rounds of sampling after the first."""
    unfilled: int
    """Zero-variance groups in the batch after the last refill."""
    passed_over: Mapping[str, int]
    """Number of prompts skipped, by task with a curriculum."""


class _Queue:
    """The prompts of one task from the start of the step, and the groups sampled from them."""

    def __init__(self, task: Task, start: int, rule: Curriculum | None, rates: Mapping[int, float]) -> None:
        self.task = task
        self.next = start
        self.rule = rule
        self.rates = rates
        self.quota = 0
        self.passed_over = 0
        self.visits: list[tuple[int, Group]] = []
        self.kept: list[Group] = []
        self.flat: list[Group] = []

    @property
    def missing(self) -> int:
        """Return the number of free places."""
        return self.quota - len(self.kept)

    def take(self) -> int:
        """Return the index of the next prompt to sample, after those that the curriculum skips."""
        if self.rule is not None:
            assert isinstance(self.task, FiniteTask)
            # At most one epoch, since every row may lie outside the band and be skipped.
            for _ in range(self.task.num_train):
                if self.rule.asks(self.next, self.rates.get(self.task.train_row(self.next))):
                    break
                self.next += 1
                self.passed_over += 1
        self.next += 1
        return self.next - 1

    def receive(self, index: int, group: Group, sort_out: bool) -> None:
        """Add the group of a prompt, set aside if it has zero variance and `sort_out` says so."""
        if self.rule is not None:
            assert isinstance(self.task, FiniteTask)
            self.visits.append((self.task.train_row(index), group))
        (self.flat if sort_out and group.zero_variance else self.kept).append(group)

    def fill_up(self) -> int:
        """Fill the free places with zero-variance groups, and return their number."""
        count = self.missing
        self.kept += self.flat[:count]
        del self.flat[:count]
        return count

    def updated_rates(self) -> dict[int, float]:
        """Return the pass rates of the rows after the step."""
        assert self.rule is not None
        rates = dict(self.rates)
        for row, group in self.visits:
            rate = self.rule.updated(rates.get(row), group)
            if rate is not None:
                rates[row] = rate
        return rates


class Selector:
    """Chooses the prompts of a step and the groups to train on.

    Args:
        tasks: training tasks.
        weights: weight of each task in the mixture.
        rollout: `prompts_per_step`, `zero_variance` and `max_refills` are used.
        curricula: curriculum of each task that has one, by name.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Sequence[float],
        rollout: RolloutConfig,
        curricula: Mapping[str, Curriculum] | None = None,
    ) -> None:
        self.tasks = tasks
        self.weights = weights
        self.rollout = rollout
        self.curricula = curricula or {}

    def first_prompts(self, step: int, position: Position) -> list[Prompt]:
        """Return the prompts that step 0, 1, ... samples first: a pure function of the step and the position."""
        queues, _ = self._queues(step, position)
        return [prompt for _, _, prompt in self._ask(queues, step, 0)]

    def select(self, step: int, position: Position, sample: SampleGroups) -> Selection:
        """Sample the step's batch.

        Args:
            sample: samples groups; it is called once a round. Ids of prompts are unique over all steps and rounds.
        """
        queues, ends = self._queues(step, position)
        rounds, asked = 0, 0
        while True:
            chosen = self._ask(queues, step, asked)
            asked += len(chosen)
            groups = sample([prompt for _, _, prompt in chosen])
            for (queue, index, _), group in zip(chosen, groups, strict=True):
                queue.receive(index, group, sort_out=self.rollout.zero_variance != "keep")
            if rounds == self.rollout.refill_rounds or not any(q.missing for q in queues):
                break
            rounds += 1
        unfilled = sum(q.fill_up() for q in queues) if self.rollout.zero_variance == "refill" else 0
        return Selection(
            groups=[g for q in queues for g in q.kept],
            dropped=[g for q in queues for g in q.flat],
            position=self._after(queues, ends, position),
            refill_rounds=rounds,
            unfilled=unfilled,
            passed_over={q.task.name: q.passed_over for q in queues if q.rule is not None},
        )

    def figures(self, selection: Selection) -> dict[str, float]:
        """Return the metrics of a selection under their names in metrics.jsonl, for the options that are on."""
        figures: dict[str, float] = {}
        if self.rollout.zero_variance == "refill":
            figures = {"groups/refill_rounds": selection.refill_rounds, "groups/unfilled": selection.unfilled}
        several = len(self.tasks) > 1
        for name, rule in self.curricula.items():
            prefix = f"task/{name}/" if several else ""
            rates = list(selection.position.pass_rates.get(name, {}).values())
            figures[f"{prefix}curriculum/passed_over"] = selection.passed_over[name]
            figures[f"{prefix}curriculum/rows_seen"] = len(rates)
            if rates:
                figures[f"{prefix}curriculum/in_band"] = sum(map(rule.in_band, rates)) / len(rates)
        return figures

    def _queues(self, step: int, position: Position) -> tuple[list[_Queue], list[int]]:
        """Return a queue for each task, and the index at which the mixture alone would end each."""
        places = range(len(self.tasks))
        scheduled: list[list[int]] = [[] for _ in places]
        for place, index in prompts_for_step(
            list(zip(places, self.weights, strict=True)), step, self.rollout.prompts_per_step
        ):
            scheduled[place].append(index)
        queues = []
        for task, indices in zip(self.tasks, scheduled, strict=True):
            start = (indices[0] if indices else 0) + position.offsets.get(task.name, 0)
            rates = position.pass_rates.get(task.name, {})
            queues.append(_Queue(task, start, self.curricula.get(task.name), rates))
            queues[-1].quota = len(indices)
        return queues, [indices[-1] + 1 if indices else 0 for indices in scheduled]

    def _ask(self, queues: Sequence[_Queue], step: int, asked: int) -> list[tuple[_Queue, int, Prompt]]:
        """Return as many prompts of each task as it has free places."""
        chosen = [(queue, queue.take()) for queue in queues for _ in range(queue.missing)]
        return [
            (queue, index, replace(queue.task.train_prompt(index), id=step << 32 | asked + i))
            for i, (queue, index) in enumerate(chosen)
        ]

    def _after(self, queues: Sequence[_Queue], ends: Sequence[int], position: Position) -> Position:
        offsets = dict(position.offsets)
        for queue, end in zip(queues, ends, strict=True):
            if queue.quota and queue.next != end:
                offsets[queue.task.name] = queue.next - end
        rates = {q.task.name: q.updated_rates() for q in queues if q.rule is not None}
        return Position(offsets, {**position.pass_rates, **rates})
