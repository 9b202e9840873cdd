"""From completions to scored completions: every reward has a status that says how it came about.

A reward of 0 can mean a wrong answer, no answer, a cut answer or a broken verifier. Only the first is about the model's
ability, so the four are kept apart and counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from sapo.data import Completion, Prompt, Score, Status
from sapo.tasks.base import Task

# A verifier's exception may quote the whole completion; the log keeps the beginning.
MAX_DETAIL = 500


def score_completions(task: Task, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Completion, ...]:
    """The completions, in order, with `score` set by the task's verifier.

    A completion that did not finish is `truncated` with reward 0 unless the task says `score_truncated = True`. An
    exception in the verifier, or a reward that is no finite number, is `verifier_error` with reward 0 and the reason.

    >>> from sapo.tasks.arithmetic import ArithmeticTask
    >>> prompt = Prompt(id=0, task="arithmetic", text="1+1=", answer="2")
    >>> completions = [Completion((), (), "stop", "1+1+0=02;#2"), Completion((), (), "length", "1+1+0=")]
    >>> [(c.score.reward, c.score.status.value) for c in score_completions(ArithmeticTask(), prompt, completions)]
    [(1.0, 'scored'), (0.0, 'truncated')]
    """
    return tuple(replace(completion, score=_score(task, prompt, completion)) for completion in completions)


def score_groups(items: Sequence[tuple[Task, Prompt, Sequence[Completion]]]) -> list[tuple[Completion, ...]]:
    """A whole batch scored, in the order given: `score_completions` of each (task, prompt, completions)."""
    return [score_completions(task, prompt, completions) for task, prompt, completions in items]


def status_counts(completions: Iterable[Completion]) -> dict[str, int]:
    """How many completions have each of the four statuses; a status that did not occur counts 0.

    >>> status_counts([Completion((), (), "stop")])
    {'scored': 1, 'unparseable': 0, 'truncated': 0, 'verifier_error': 0}
    """
    counts = {status.value: 0 for status in Status}
    for completion in completions:
        counts[completion.score.status.value] += 1
    return counts


def checked_reward(value: Any) -> float:
    """`value` as a finite float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not finite.
    """
    if not isinstance(value, (Real, np.bool_)):
        raise TypeError(f"a reward must be a number; got {type(value).__name__}; return a float, a bool or a Score")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be finite; got {reward}; return 0 for an answer that cannot be judged")
    return reward


def _score(task: Task, prompt: Prompt, completion: Completion) -> Score:
    if completion.finish_reason == "length" and not getattr(task, "score_truncated", False):
        return Score(0.0, Status.TRUNCATED, f"no end token within {len(completion)} tokens")
    # Any exception: a verifier is often a user's code, and one bad completion must not end a run unrecorded.
    try:
        score = task.verify(completion.text, prompt)
        if not isinstance(score, Score):
            raise TypeError(f"verify must return a Score; got {type(score).__name__}")
        return replace(score, reward=checked_reward(score.reward))
    except Exception as error:
        return Score(0.0, Status.VERIFIER_ERROR, f"{type(error).__name__}: {error}"[:MAX_DETAIL])
