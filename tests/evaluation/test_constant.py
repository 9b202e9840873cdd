"""The best constant answer against cases counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sapo.data import Prompt, Score, Status
from sapo.errors import Interrupted
from sapo.evaluation import best_constant, constant
from sapo.tasks import FileTask
from sapo.tasks.generated.arithmetic import ArithmeticTask
from support.evaluation_cases import WrittenTask


class BoxedTask(WrittenTask):
    """Wants the answer in a box, and reads 070 and 70 as one."""

    def verify(self, text: str, prompt: Prompt) -> Score:
        found = re.fullmatch(r"\\boxed\{(\d+)\}", text)
        if not found:
            return Score(0.0, Status.UNPARSEABLE)
        answer = str(int(found[1]))
        return Score(float(answer == str(int(prompt.answer or "-1"))), answer=answer)


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(i, "t", f"question {i}", answer=a) for i, a in enumerate(answers)]


def test_it_is_the_answer_that_is_right_most_often() -> None:
    found = best_constant(WrittenTask(), prompts("a", "b", "b", "c"))
    assert (found.answer, found.share, found.judged, found.distinct) == ("b", 2 / 4, 3, 3)


def test_it_is_spelled_as_the_verifier_wants_it_and_equal_answers_are_one() -> None:
    found = best_constant(BoxedTask(), prompts("70", "070", "3"))
    assert (found.answer, found.share, found.distinct) == ("70", pytest.approx(2 / 3), 2)


def test_the_arithmetic_task_has_one_too() -> None:
    task = ArithmeticTask(digits=1, seed=0)
    held_out = task.held_out(100)
    most = max(map([p.answer for p in held_out].count, {p.answer for p in held_out}))
    assert best_constant(task, held_out).share == most / len(held_out)


def test_a_reference_that_is_a_whole_solution_counts_by_its_answer(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": f"{'so ' * i}it is #### {i // 20}"} for i in range(40)]
    file = tmp_path / "solutions.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = FileTask(file, verifier="hash_answer", held_out_fraction=0.5)
    held_out = task.held_out(40)
    first = sum(int(p.text[1:]) < 20 for p in held_out) / len(held_out)
    assert best_constant(task, held_out).share == max(first, 1 - first)


@pytest.mark.parametrize("answers", [(None, None), ("", " ")])
def test_problems_without_answers_have_none(answers: tuple[str | None, ...]) -> None:
    assert best_constant(WrittenTask(), prompts(*answers)) is None


def test_a_verifier_that_judges_no_written_answer_has_none() -> None:
    class RunsTests(WrittenTask):
        def verify(self, text: str, prompt: Prompt) -> Score:
            return Score(0.0, Status.UNPARSEABLE, "no code")

    assert best_constant(RunsTests(), prompts("def f(): ...", "def g(): ...")) is None


def test_a_lenient_verifier_is_found_out() -> None:
    """A constant that is right although it is no problem's exact answer: the verifier judges, not equality."""

    class FirstLetter(WrittenTask):
        def verify(self, text: str, prompt: Prompt) -> Score:
            return Score(float(text[:1] == (prompt.answer or "")[:1]))

    found = best_constant(FirstLetter(), prompts("apple", "avocado", "banana"))
    assert (found.answer, found.share) == ("apple", pytest.approx(2 / 3))


def test_the_threshold_decides_what_is_right() -> None:
    class Half(WrittenTask):
        def verify(self, text: str, prompt: Prompt) -> Score:
            return Score(1.0 if text == prompt.answer else 0.5)

    assert best_constant(Half(), prompts("a", "b")).share == 0.5
    assert best_constant(Half(), prompts("a", "b"), threshold=0.5).share == 1.0


def test_a_slow_verifier_judges_the_most_frequent_answers_and_their_number_is_told(monkeypatch) -> None:
    monkeypatch.setattr(constant, "MOST_JUDGEMENTS", 12)  # of 6 problems: two constants
    found = best_constant(WrittenTask(), prompts("a", "b", "c", "c", "d", "b"))
    assert (found.judged, found.distinct) == (2, 4)
    assert (found.answer, found.share) == ("b", pytest.approx(2 / 6))


def test_a_request_to_stop_is_heard() -> None:
    with pytest.raises(Interrupted):
        best_constant(WrittenTask(), prompts("a", "b"), should_stop=lambda: True)
