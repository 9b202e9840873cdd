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
from sapo.tasks.verifiers.base import ABSTAINED
from sapo.tasks.verifiers.combined import CombinedHere
from sapo.tasks.verifiers.in_process import InProcess
from sapo.tasks.workers.pool import shared_pool
from sapo.tasks.workers.wire import Job
from sapo.utils.text import name_error

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

    Isolated verifiers run in worker processes in parallel, the others in this process; a function that the user gave to
    this process gets its whole batch at once. Equal completions of one prompt
    are scored once where the verifier is pure. A verifier that is batched gets the completions of a prompt in one call.
    """
    jobs, owners = _jobs_for_workers(items)
    scores: dict[_Place, Score] = {}
    for owned, found in zip(owners, shared_pool().run_batches(jobs) if jobs else [], strict=True):
        for places, score in zip(owned, found, strict=True):
            scores |= dict.fromkeys(places, score)
    scores |= _scores_here(items)
    return [
        tuple(
            replace(completion, score=_of_one_turn(scores.get(_Place(i, j)) or _score(task, prompt, completion)))
            for j, completion in enumerate(completions)
        )
        for i, (task, prompt, completions) in enumerate(items)
    ]


def _of_one_turn(score: Score) -> Score:
    """Refuse rewards of turns from a verifier, which has seen one text."""
    if not score.turn_rewards:
        return score
    detail = f"turn_rewards are for play and judge of an environment; got {len(score.turn_rewards)} from a verifier"
    return Score(0.0, Status.VERIFIER_ERROR, f"ValueError: {detail}")


def _jobs_for_workers(
    items: Sequence[tuple[Task, Prompt, Sequence[Completion]]],
) -> tuple[list[Job], list[list[list[_Place]]]]:
    """Return the jobs for the worker pool, and for each text of a job the completions that have it."""
    jobs: list[Job] = []
    owners: list[list[list[_Place]]] = []
    for i, (task, prompt, completions) in enumerate(items):
        verifier = _isolated_verifier(task)
        if verifier is None:
            continue
        if verifier.batched:
            judged = [(j, completion) for j, completion in enumerate(completions) if not _truncated(task, completion)]
            if judged:
                jobs.append(verifier.batch([completion.text for _, completion in judged], prompt))
                owners.append([[_Place(i, j)] for j, _ in judged])
            continue
        seen: dict[str, int] = {}
        for j, completion in enumerate(completions):
            if _truncated(task, completion):
                continue
            if verifier.pure and completion.text in seen:
                owners[seen[completion.text]][0].append(_Place(i, j))
                continue
            seen[completion.text] = len(jobs)
            jobs.append(verifier.job(completion.text, prompt))
            owners.append([[_Place(i, j)]])
    return jobs, owners


def _scores_here(items: Sequence[tuple[Task, Prompt, Sequence[Completion]]]) -> dict[_Place, Score]:
    """Return the scores by verifiers that are functions of this process, each with all its completions in one call."""
    by_verifier: dict[int, tuple[InProcess | CombinedHere, list[tuple[int, list[int]]]]] = {}
    for i, (task, _, completions) in enumerate(items):
        verifier = _verifier_of(task)
        places = [j for j, completion in enumerate(completions) if not _truncated(task, completion)]
        if isinstance(verifier, InProcess | CombinedHere) and places:
            by_verifier.setdefault(id(verifier), (verifier, []))[1].append((i, places))
    scores: dict[_Place, Score] = {}
    for verifier, asked in by_verifier.values():
        requests = [([items[i][2][j].text for j in places], items[i][1]) for i, places in asked]
        for (i, places), found in zip(asked, verifier.score_many(requests), strict=True):
            scores |= {_Place(i, j): score or ABSTAINED for j, score in zip(places, found, strict=True)}
    return scores


def status_counts(completions: Iterable[Completion]) -> dict[str, int]:
    """Count the completions with each status; errors of environments are there only where there are some.

    >>> status_counts([Completion((), (), "stop")])
    {'scored': 1, 'unparseable': 0, 'truncated': 0, 'verifier_error': 0}
    """
    counts = {status.value: 0 for status in Status}
    for completion in completions:
        counts[completion.score.status.value] += 1
    if not counts[Status.ENVIRONMENT_ERROR.value]:
        del counts[Status.ENVIRONMENT_ERROR.value]
    return counts


@dataclass(frozen=True)
class _Place:
    """The place of a completion in a batch."""

    item: int
    completion: int


def _truncated(task: Task, completion: Completion) -> bool:
    return completion.finish_reason == "length" and not getattr(task, "score_truncated", False)


def _isolated_verifier(task: Task) -> Isolated | None:
    verifier = _verifier_of(task)
    return verifier if isinstance(verifier, Isolated) else None


def _verifier_of(task: Task) -> object:
    """Return a task's verifier, None where it overrides `verify` and does not use one."""
    if getattr(type(task), "verify", None) is not JudgedTask.verify:
        return None
    return getattr(task, "verifier", None)


def _score(task: Task, prompt: Prompt, completion: Completion) -> Score:
    if _truncated(task, completion):
        return Score(0.0, Status.TRUNCATED, f"no end token within {len(completion)} tokens")
    # Any exception, and a call of sys.exit(): a verifier is often a user's code, and one bad completion must not end a
    # run.
    try:
        return checked_score(task.verify(completion.text, prompt))
    except (Exception, SystemExit) as error:
        return Score(0.0, Status.VERIFIER_ERROR, name_error(error)[:MAX_DETAIL])
