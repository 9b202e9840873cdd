"""Score completions: every reward has a status that says how it came about.

A reward of 0 can mean a wrong answer, no answer, a truncated answer or a failed verifier. Only the first is about the
ability of the model, so the four are counted separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sapo.data import Completion, Prompt, Score, Status
from sapo.tasks.base import JudgedTask, Task, checked_score
from sapo.tasks.verifiers import Isolated
from sapo.tasks.workers.pool import shared_pool
from sapo.tasks.workers.wire import Job

# A verifier's exception may quote the whole completion; the log keeps the beginning.
MAX_DETAIL = 500


def score_completions(task: Task, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Completion, ...]:
    """Score the completions of one prompt by the task's verifier.

    A completion that did not finish has reward 0 and status `truncated`, unless the task has `score_truncated = True`.
    Where the verifier raises an exception, or its reward is no finite number, the reward is 0, the status is
    `verifier_error` and `detail` has the reason.

    >>> from sapo.tasks.generated.arithmetic import ArithmeticTask
    >>> prompt = Prompt(id=0, task="arithmetic", text="1+1=", answer="2")
    >>> completions = [Completion((), (), "stop", "1+1+0=02;#2"), Completion((), (), "length", "1+1+0=")]
    >>> [(c.score.reward, c.score.status.value) for c in score_completions(ArithmeticTask(), prompt, completions)]
    [(1.0, 'scored'), (0.0, 'truncated')]
    """
    return score_groups([(task, prompt, completions)])[0]


def score_groups(items: Sequence[tuple[Task, Prompt, Sequence[Completion]]]) -> list[tuple[Completion, ...]]:
    """Score a whole batch, in the order given: `score_completions` of each (task, prompt, completions).

    Isolated verifiers run in worker processes in parallel, the others in this process. Equal completions of one prompt
    are scored once where the verifier is pure.
    """
    jobs, owners = _jobs_for_workers(items)
    scores: dict[_Place, Score] = {}
    for places, score in zip(owners, shared_pool().run(jobs) if jobs else [], strict=True):
        scores |= dict.fromkeys(places, score)
    return [
        tuple(
            replace(completion, score=scores.get(_Place(i, j)) or _score(task, prompt, completion))
            for j, completion in enumerate(completions)
        )
        for i, (task, prompt, completions) in enumerate(items)
    ]


def _jobs_for_workers(
    items: Sequence[tuple[Task, Prompt, Sequence[Completion]]],
) -> tuple[list[Job], list[list[_Place]]]:
    """Return the jobs for the worker pool, and the completions that each job scores."""
    jobs: list[Job] = []
    owners: list[list[_Place]] = []
    for i, (task, prompt, completions) in enumerate(items):
        verifier = _isolated_verifier(task)
        if verifier is None:
            continue
        seen: dict[str, int] = {}
        for j, completion in enumerate(completions):
            if _truncated(task, completion):
                continue
            if verifier.pure and completion.text in seen:
                owners[seen[completion.text]].append(_Place(i, j))
                continue
            seen[completion.text] = len(jobs)
            jobs.append(verifier.job(completion.text, prompt))
            owners.append([_Place(i, j)])
    return jobs, owners


def status_counts(completions: Iterable[Completion]) -> dict[str, int]:
    """Count the completions with each of the four statuses.

    >>> status_counts([Completion((), (), "stop")])
    {'scored': 1, 'unparseable': 0, 'truncated': 0, 'verifier_error': 0}
    """
    counts = {status.value: 0 for status in Status}
    for completion in completions:
        counts[completion.score.status.value] += 1
    return counts


@dataclass(frozen=True)
class _Place:
    """The place of a completion in a batch."""

    item: int
    completion: int


def _truncated(task: Task, completion: Completion) -> bool:
    return completion.finish_reason == "length" and not getattr(task, "score_truncated", False)


def _isolated_verifier(task: Task) -> Isolated | None:
    # A task that overrides `verify` does not use its verifier.
    if getattr(type(task), "verify", None) is not JudgedTask.verify:
        return None
    verifier = getattr(task, "verifier", None)
    return verifier if isinstance(verifier, Isolated) else None


def _score(task: Task, prompt: Prompt, completion: Completion) -> Score:
    if _truncated(task, completion):
        return Score(0.0, Status.TRUNCATED, f"no end token within {len(completion)} tokens")
    # Any exception: a verifier is often a user's code, and one bad completion must not end a run.
    try:
        return checked_score(task.verify(completion.text, prompt))
    except Exception as error:
        return Score(0.0, Status.VERIFIER_ERROR, f"{type(error).__name__}: {error}"[:MAX_DETAIL])
