"""A curriculum by pass rate: rows that the policy always or never solves are sampled less often.

Each row of a finite task has a running pass rate, over its own samples in this run. A row whose rate lies outside the
band is sampled with the probability `outside` when its turn comes, and skipped otherwise. Rows inside the band and rows
not yet seen are always sampled. A counter-based draw decides, named by the task and the index. So the choice depends on
the seed and on the recorded pass rates alone.

Prioritising prompts by their success rate is common practice (Kimi k1.5, https://arxiv.org/abs/2501.12599, samples in
proportion to 1 - s_i). A band with a floor is our choice: rows that are never solved have no gradient either, and a
row outside the band must be able to return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sapo.config import CurriculumConfig, RunConfig
from sapo.data import Group
from sapo.errors import ConfigError
from sapo.tasks import FiniteTask, Task
from sapo.utils.rewards import is_right
from sapo.utils.rng import token_uniforms


@dataclass(frozen=True)
class Curriculum:
    """The curriculum of one task.

    >>> from sapo.config import CurriculumConfig
    >>> rule = Curriculum(CurriculumConfig(low=0.1, high=0.9, outside=0.25), seed=0)
    >>> [rule.asks(index, 1.0) for index in range(8)]  # at random, one turn in four
    [False, False, True, False, False, False, False, False]
    >>> rule.asks(0, None), rule.asks(0, 0.5), rule.asks(0, 0.9)  # not seen yet, inside, on the edge
    (True, True, True)
    """

    settings: CurriculumConfig
    seed: int
    """Random seed of this task, 64 bits."""

    def asks(self, index: int, rate: float | None) -> bool:
        """Return whether the row at `index` is sampled, given its pass rate so far."""
        if self.in_band(rate):
            return True
        return float(token_uniforms(self.seed, index, np.zeros(1, dtype=np.int64), 1)[0, 0]) < self.settings.outside

    def in_band(self, rate: float | None) -> bool:
        """Return whether a pass rate lies in the band. None, a row not seen yet, does."""
        return rate is None or self.settings.low <= rate <= self.settings.high

    def updated(self, rate: float | None, group: Group) -> float | None:
        """Return the pass rate of a row after one more group; as before where all completions of the group failed.

        >>> from sapo.config import CurriculumConfig
        >>> from sapo.data import Completion, Prompt, Score
        >>> half = [Completion((), (), "stop", score=Score(reward)) for reward in (1.0, 0.0)]
        >>> Curriculum(CurriculumConfig(memory=0.5), 0).updated(1.0, Group(Prompt(0, "t", ""), tuple(half)))
        0.75
        """
        rewards = group.scored_rewards
        if not rewards:
            return rate
        share = sum(map(is_right, rewards)) / len(rewards)
        memory = self.settings.memory
        return share if rate is None else memory * rate + (1 - memory) * share


def curricula(config: RunConfig, tasks: Sequence[Task], seeds: Mapping[str, int]) -> dict[str, Curriculum]:
    """Return the curriculum of each task that has one, by its name.

    Args:
        seeds: random seed of each task, by its name.

    Raises:
        ConfigError: a curriculum for a task without rows.
    """
    found = {}
    for section, task in zip(config.tasks, tasks, strict=True):
        settings = section.curriculum or config.curriculum
        if settings is None:
            continue
        if not isinstance(task, FiniteTask):
            raise ConfigError(
                f"a curriculum is for tasks with a finite number of rows; got {task.name!r}, whose prompts never "
                "repeat; write curriculum: {...} only beside the tasks that have rows"
            )
        found[task.name] = Curriculum(settings, seeds[task.name])
    return found
