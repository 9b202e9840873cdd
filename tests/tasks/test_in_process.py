"""Reward functions of this process: how they are called, and what their failures come to."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sapo.data import Completion, Prompt, Status
from sapo.errors import TaskError
from sapo.tasks import load_verifier, score_groups
from sapo.tasks.base import JudgedTask
from sapo.tasks.verifiers import in_process
from sapo.tasks.verifiers.in_process import keep_function

ROW = Prompt(id=0, task="t", text="1+1=", answer="2", metadata={"wanted": "7"})


class Judged(JudgedTask):
    name = "t"

    def __init__(self, verifier: Any) -> None:
        self.verifier = verifier


def scores(spec: Any, texts: list[str], prompts: int = 1) -> list[list[Any]]:
    task = Judged(load_verifier(spec))
    items = [(task, ROW, [Completion((), (), "stop", text) for text in texts])] * prompts
    return [[completion.score for completion in group] for group in score_groups(items)]


def rewards(function: Any, texts: list[str]) -> list[float]:
    return [score.reward for score in scores(keep_function(function), texts)[0]]


async def later(completion: str, wanted: str) -> float:
    await asyncio.sleep(0)
    return float(completion == wanted)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda completion: float(completion == "7"), [1.0, 0.0]),
        (lambda text: text == "7", [1.0, 0.0]),
        (lambda completion, wanted: completion == wanted, [1.0, 0.0]),
        (lambda completions, wanted, **columns: [c == w for c, w in zip(completions, wanted, strict=True)], [1.0, 0.0]),
        (lambda completions, answer, **_: [float(len(completions))] * len(answer), [2.0, 2.0]),
        (later, [1.0, 0.0]),
        (lambda completion, wanted: later(completion, wanted), [1.0, 0.0]),
    ],
)
def test_a_function_is_called_with_a_completion_or_a_batch_and_the_columns_by_name(function, expected) -> None:
    assert rewards(function, ["7", "8"]) == expected


def test_calls_of_a_coroutine_function_are_under_way_together_over_all_prompts_of_a_batch() -> None:
    # By hand: each waits until all six have begun, so that calls one after the other would end at the deadline.
    begun: list[str] = []
    everyone = asyncio.Event()

    async def judge(completion: str) -> float:
        begun.append(completion)
        if len(begun) == 6:
            everyone.set()
        await everyone.wait()
        return 1.0

    found = scores({"name": keep_function(judge), "deadline": 20}, ["a", "b"], prompts=3)
    assert [[s.reward for s in group] for group in found] == [[1.0, 1.0]] * 3


def test_a_call_beyond_its_deadline_is_a_failure_and_the_next_call_is_made() -> None:
    release = threading.Event()

    def slow(completion: str) -> float:
        if completion == "hang":
            release.wait(60)
        return 1.0

    found = scores({"name": keep_function(slow), "deadline": 0.3}, ["hang", "ok"])[0]
    release.set()
    assert [s.status for s in found] == [Status.VERIFIER_ERROR, Status.SCORED]
    assert found[0].detail == "no answer within 0.3 s (deadline)"
    assert found[1].reward == 1.0

    async def asleep(completion: str) -> float:
        await asyncio.sleep(60 if completion == "hang" else 0)
        return 1.0

    found = scores({"name": keep_function(asleep), "deadline": 0.3}, ["hang", "ok"])[0]
    assert [s.status for s in found] == [Status.VERIFIER_ERROR, Status.SCORED]


def ended(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(30)  # a limit for a thread that waits for ever, not a measurement
    return not any(thread.is_alive() for thread in threads)


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_thread_that_was_left_behind_ends_with_its_late_call(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(in_process, "_caller", in_process._Caller())
    before = set(named("sapo-reward"))
    late = keep_function(lambda completion: float(release.wait(60)))
    found = scores({"name": late, "deadline": 0.1}, ["a", "b", "c"])[0]
    assert [s.status for s in found] == [Status.VERIFIER_ERROR] * 3
    threads = [t for t in named("sapo-reward") if t not in before]
    assert len(threads) == 3, "one for each late call"
    release.set()
    assert ended(threads)


def test_an_event_loop_that_was_not_given_back_ends_with_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(in_process, "_loop", in_process._Loop())
    monkeypatch.setattr(in_process, "GRACE", 0.1)
    before = set(named("sapo-reward-loop"))

    async def blocking(completion: str) -> float:
        if completion == "hang":
            release.wait(60)
        await asyncio.sleep(60)
        return 1.0

    found = scores({"name": keep_function(blocking), "deadline": 0.1}, ["hang", "ok"])[0]
    assert [s.status for s in found] == [Status.VERIFIER_ERROR] * 2
    (thread,) = [t for t in named("sapo-reward-loop") if t not in before]
    release.set()
    assert ended([thread])


def test_an_exception_and_a_reward_that_is_no_number_are_failures_of_their_completion_alone() -> None:
    def moody(completion: str) -> Any:
        if completion == "raise":
            raise KeyError("gold")
        return "high" if completion == "text" else 0.5

    found = scores(keep_function(moody), ["raise", "text", "fine"])[0]
    assert [s.status for s in found] == [Status.VERIFIER_ERROR, Status.VERIFIER_ERROR, Status.SCORED]
    assert found[0].detail == "KeyError: 'gold'"
    assert "a reward must be a number; got str" in found[1].detail


def test_a_weighted_sum_has_functions_of_this_process_beside_verifiers_of_ours() -> None:
    # By hand: 0.5 x 1 + 0.25 x 1 + 0.25 x 0.5, and without the answer 0.25 x 1 + 0.25 x 0.5.
    batch = keep_function(lambda completions, **_: [1.0] * len(completions))
    other = keep_function(lambda completion: 0.5, taken=[batch])
    assert other != batch
    spec = [{"name": "last_number", "weight": 0.5}, {"name": batch, "weight": 0.25}, {"name": other, "weight": 0.25}]
    found = scores(spec, ["so 2", "so 3"])[0]
    assert [s.reward for s in found] == [0.875, 0.375]
    assert dict(found[0].figures) == {"last_number": 1.0, "reward": 1.0, "reward_2": 0.5}


def test_a_failing_term_is_a_failure_of_the_sum() -> None:
    bad = keep_function(lambda completion: 1 / 0)
    found = scores([{"name": "last_number", "weight": 0.5}, {"name": bad, "weight": 0.5}], ["so 2"])[0]
    assert (found[0].reward, found[0].status) == (0.0, Status.VERIFIER_ERROR)
    assert found[0].detail.startswith("reward: ZeroDivisionError")


def test_a_process_without_the_function_says_where_it_was_and_how_to_go_on() -> None:
    with pytest.raises(TaskError) as caught:
        load_verifier("in_process:clarity")
    assert "'clarity' was one of the Python session that began the run" in str(caught.value)
    assert "sapo.resume(RUN, rewards=[clarity])" in str(caught.value)
    with pytest.raises(TaskError, match=r"takes the options deadline; got 'deadlin'; did you mean 'deadline'"):
        load_verifier({"name": "in_process:clarity", "deadlin": 3})
