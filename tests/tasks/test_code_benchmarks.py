"""The verifier `code` on every real row of HumanEval and of the LiveCodeBench sample: right answers and wrong ones."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from sapo.data import Prompt, Status
from sapo.errors import TaskError
from sapo.tasks.verifiers.code import code
from sapo.tasks.verifiers.code_tests import CodeTests

BENCHDATA = Path(__file__).parents[2] / ".." / "shared" / "benchdata"

# Solutions of our own, by question: what the statement asks for, worked out by hand.
SOLUTIONS = {
    "1883_C": """
def cost(k, a):
    near = min(-x % k for x in a)
    if k == 4:
        even = sum(x % 2 == 0 for x in a)
        return min(near, max(0, 2 - even))
    return near
for _ in range(int(input())):
    n, k = map(int, input().split())
    print(cost(k, list(map(int, input().split()))))
""",
    "1899_A": """
for _ in range(int(input())):
    print("First" if int(input()) % 3 else "Second")
""",
    "1899_C": """
for _ in range(int(input())):
    input()
    a = list(map(int, input().split()))
    best = here = a[0]
    for before, x in zip(a, a[1:]):
        here = max(here, 0) + x if (before - x) % 2 else x
        best = max(best, here)
    print(best)
""",
}
# The same with one mistake each.
MISTAKES = {
    "1883_C": ("max(0, 2 - even)", "2"),
    "1899_A": ('"First" if', '"First " "!" if'),
    "1899_C": ("max(here, 0) + x", "here + x"),
}


def rows(name: str) -> list[dict]:
    path = BENCHDATA / name
    if not path.exists():
        pytest.skip(f"no {name} beside the project")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def needs_a_sandbox():
    try:
        code.prepare()
    except TaskError as error:
        pytest.skip(str(error))


def judge(text: str, tests: CodeTests):
    return code(text, Prompt(id=0, task="t", text="?", metadata={"tests": tests.to_json()}))


def humaneval(row: dict) -> CodeTests:
    return CodeTests.from_humaneval(row["prompt"], row["test"], row["entry_point"])


@pytest.mark.slow
def test_every_reference_solution_of_humaneval_scores_one():
    wrong = {}
    for row in rows("humaneval.jsonl"):
        score = judge(row["canonical_solution"], humaneval(row))
        if score.reward != 1.0 or score.figures != {"tests_passed": 1.0}:
            wrong[row["task_id"]] = score
    assert wrong == {}


@pytest.mark.slow
def test_every_reference_solution_of_humaneval_scores_one_as_a_whole_function_in_a_block():
    wrong = {}
    for row in rows("humaneval.jsonl")[::4]:
        score = judge(f"Sure!\n```python\n{row['prompt']}{row['canonical_solution']}\n```", humaneval(row))
        if score.reward != 1.0:
            wrong[row["task_id"]] = score
    assert wrong == {}


@pytest.mark.slow
def test_junk_scores_zero_on_every_row_of_humaneval():
    passed = {}
    for number, row in enumerate(rows("humaneval.jsonl")):
        junk = ["    return None\n", "I would rather not say.", f"```python\ndef {row['entry_point']}(*a): ...\n```"]
        score = judge(junk[number % 3], humaneval(row))
        expected = (Status.SCORED, Status.UNPARSEABLE, Status.SCORED)[number % 3]
        if score.reward != 0.0 or score.status is not expected:
            passed[row["task_id"]] = score
    assert passed == {}


@pytest.mark.parametrize("question", SOLUTIONS)
def test_livecodebench_rows_tell_right_from_wrong(question):
    (row,) = [row for row in rows("livecodebench_3.jsonl") if row["question_id"] == question]
    tests = CodeTests.from_livecodebench(row["public_test_cases"])
    right = SOLUTIONS[question]
    assert judge(f"```python\n{right}\n```", tests).reward == 1.0
    mistaken = right.replace(*MISTAKES[question])
    assert mistaken != right
    score = judge(f"```python\n{mistaken}\n```", tests)
    assert (score.reward, score.status, score.figures) == (0.0, Status.SCORED, {"tests_passed": 0.0})
    assert score.detail.startswith("test 1: printed")
    assert judge("I cannot solve it.", tests).status is Status.UNPARSEABLE


def test_every_livecodebench_row_has_a_solution_here():
    assert {row["question_id"] for row in rows("livecodebench_3.jsonl")} == set(SOLUTIONS)


def test_private_tests_are_judged_like_public_ones():
    row = next(row for row in rows("livecodebench_3.jsonl") if row["question_id"] == "1899_A")
    hidden = json.dumps([{"input": "2\n4\n6\n", "output": "First\nSecond\n", "testtype": "stdin"}])
    private = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    tests = CodeTests.from_livecodebench(row["public_test_cases"], private)
    assert len(tests) == 2
    assert judge(SOLUTIONS["1899_A"], tests).reward == 1.0
