"""Find reward functions that do not work: a trial call before a run, and the calls that failed in a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sapo.data import Completion, Score, Status
from sapo.errors import TaskError
from sapo.tasks.base import Task
from sapo.tasks.verifiers import Isolated
from sapo.tasks.verifiers.combined import CombinedHere
from sapo.tasks.verifiers.in_process import InProcess

MADE_COMPLETION = "a made completion"


@dataclass(frozen=True)
class TriedReward:
    """One call of a user's reward function on a made completion.

    >>> TriedReward("poems", "a made completion", Score(0.25)).sentence
    "reward function of poems: 0.25 for the made completion 'a made completion'"
    """

    task: str
    completion: str
    """The answer of the first training row, or MADE_COMPLETION where it has none or the function fails on it."""
    score: Score

    @property
    def sentence(self) -> str:
        """Say what the function gave."""
        return f"reward function of {self.task}: {self.score.reward:g} for the made completion {self.completion[:80]!r}"


@dataclass(frozen=True)
class FailedCalls:
    """The calls of a verifier in a step that ended in an exception.

    >>> FailedCalls(failed=2, called=8, first="KeyError: 'answer'").sentence
    "the verifier failed on 2 of 8 completions, the first time with KeyError: 'answer'"
    """

    failed: int
    called: int
    """Completions that were judged; truncated ones are not."""
    first: str
    """Text of the first exception."""

    @property
    def sentence(self) -> str:
        """Say how many calls failed, and how the first did."""
        return f"the verifier failed on {self.failed} of {self.called} completions, the first time with {self.first}"


def try_reward(task: Task) -> TriedReward | None:
    """Call a task's reward function on a made completion, where it is a user's own; on another where that fails.

    Raises:
        TaskError: the function raised an exception or returned no finite number.
    """
    verifier = getattr(task, "verifier", None)
    if not isinstance(verifier, Isolated | InProcess | CombinedHere):
        return None
    if isinstance(verifier, Isolated) and verifier.home is None:
        return None
    prompt = task.train_prompt(0)
    text = prompt.answer or MADE_COMPLETION
    score = verifier(text, prompt)
    if score.status is Status.VERIFIER_ERROR and prompt.answer:
        # A function may refuse one completion and work on others; what fails on two does not work.
        text = MADE_COMPLETION
        score = verifier(text, prompt)
    if score.status is Status.VERIFIER_ERROR:
        raise TaskError(
            f"the reward function of task {task.name!r} failed on a made completion, {text[:80]!r}: {score.detail}; "
            "mend it: a run would have nothing to learn from"
        )
    return TriedReward(task.name, text, score)


def failed_calls(completions: Iterable[Completion]) -> FailedCalls | None:
    """Count the calls that failed, or return None where none did.

    >>> failed_calls([Completion((), (), "stop")]) is None
    True
    """
    called = [c for c in completions if c.score.status is not Status.TRUNCATED]
    failed = [c for c in called if c.score.status is Status.VERIFIER_ERROR]
    return FailedCalls(len(failed), len(called), failed[0].score.detail) if failed else None
