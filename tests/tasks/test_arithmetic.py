"""Arithmetic tasks: the formats letter by letter, the working against Python's own integers, and the split."""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data import Prompt, Status
from sapo.errors import TaskError
from sapo.tasks import ALPHABET, ArithmeticTask, Task, WorkedTask
from sapo.tasks.generated.arithmetic import canonical, check_disjoint, worked_text

OPTIONS = [
    {"operation": "add", "digits": 1},
    {"operation": "add", "digits": 4},
    {"operation": "add", "digits": 12},
    {"operation": "multiply", "digits": 1},
    {"operation": "multiply", "digits": 3},
    {"operation": "modular_chain"},
    {"operation": "modular_chain", "terms": 5, "modulus": 97},
]
TASKS = [ArithmeticTask(**options) for options in OPTIONS]


def evaluate(prompt_text):
    """The answer by Python's integers; chains are folded from the left, which parentheses spell out."""
    problem = prompt_text.removesuffix("=")
    if "%" not in problem:
        a, sign, b = re.fullmatch(r"(\d+)([+*])(\d+)", problem).groups()
        return int(a) + int(b) if sign == "+" else int(a) * int(b)
    chain, _, modulus = problem.rpartition("%")
    first, *rest = re.findall(r"[-+*]?\d+", chain)
    value = int(first)
    for term in rest:
        value = {"+": value + int(term[1:]), "-": value - int(term[1:]), "*": value * int(term[1:])}[term[0]]
    return value % int(modulus)  # reducing once at the end is the same as reducing every step


def twin_of(prompt_text):
    """A problem of two operands as Python integers in ascending order, apart from the code's canonical form."""
    return tuple(sorted(int(number) for number in re.findall(r"\d+", prompt_text)))


# --------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("prompt_text", "working"),
    [
        # By hand.
        ("1234+5678=", "4+8+0=12;3+7+1=11;2+6+1=09;1+5+0=06;#6912"),
        ("9+9=", "9+9+0=18;#18"),
        ("0+0=", "0+0+0=00;#0"),
        ("99+99=", "9+9+0=18;9+9+1=19;#198"),
        ("12*34=", "12*4=48;12*30=360;48+360=408;#408"),
        ("7*8=", "7*8=56;#56"),
        ("12*30=", "12*0=0;12*30=360;0+360=360;#360"),
        ("111*222=", "111*2=222;111*20=2220;111*200=22200;222+2220=2442;2442+22200=24642;#24642"),
        ("3+4*2-5%7=", "3+4=0;0*2=0;0-5=2;#2"),
        ("60*50%97=", "60*50=90;#90"),
    ],
)
def test_working_is_written_letter_by_letter_as_documented(prompt_text, working):
    assert worked_text(prompt_text) == working


def test_a_chain_is_evaluated_from_left_to_right_without_precedence():
    assert worked_text("1+2*3%7=").endswith("#2")  # (1 + 2) * 3 = 9 = 2 mod 7; with precedence it would be 0


def test_the_alphabet_is_exactly_the_17_characters_that_occur():
    assert len(ALPHABET) == len(set(ALPHABET)) == 17
    used = set()
    for task in TASKS:
        for index in range(200):
            prompt, response = task.worked_example(index)
            used |= set(prompt.text + response)
    assert used == set(ALPHABET)


def test_a_response_of_four_digit_addition_has_41_or_42_characters():
    # 9 characters for each digit, '#', and a sum of four or five digits.
    lengths = {len(TASKS[1].worked_example(index)[1]) for index in range(200)}
    assert lengths == {36 + 1 + 4, 36 + 1 + 5}


# ----------------------------------------------------------------------------------------------------- worked text


@given(st.sampled_from(TASKS), st.integers(0, 2**63 - 1))
@settings(max_examples=2000, deadline=None)
def test_every_worked_example_is_right_by_an_independent_evaluation(task, index):
    prompt, response = task.worked_example(index)
    answer = evaluate(prompt.text)
    assert response.endswith(f"#{answer}")
    assert prompt.answer == str(answer)
    assert prompt.id == index
    assert prompt.text == task.train_prompt(index).text
    score = task.verify(response, prompt)
    assert (score.reward, score.status) == (1.0, Status.SCORED)
    assert task.verify(f"#{answer + 1}", prompt).reward == 0.0


@given(st.sampled_from(TASKS), st.integers(0, 10**9))
@settings(max_examples=500, deadline=None)
def test_every_written_step_is_itself_true(task, index):
    _, response = task.worked_example(index)
    modulus = task.modulus if task.operation == "modular_chain" else None
    for step in response.partition("#")[0].rstrip(";").split(";"):
        left, right = step.split("=")
        first, *rest = re.findall(r"[-+*]?\d+", left)
        value = int(first)
        for term in rest:
            number = int(term[1:])
            value = {"+": value + number, "-": value - number, "*": value * number}[term[0]]
        assert int(right) == (value % modulus if modulus else value)


@pytest.mark.parametrize(("digits", "lowest", "highest"), [(1, 0, 9), (2, 10, 99), (4, 1000, 9999)])
@pytest.mark.parametrize("operation", ["add", "multiply"])
def test_operands_have_exactly_the_digits_asked_for_and_reach_both_ends(operation, digits, lowest, highest):
    task = ArithmeticTask(operation=operation, digits=digits)
    operands = [n for index in range(3000) for n in twin_of(task.train_prompt(index).text)]
    assert lowest <= min(operands) <= lowest + (highest - lowest) // 100
    assert highest - (highest - lowest) // 100 <= max(operands) <= highest


def test_operands_are_drawn_uniformly():
    counts = [0] * 10
    for index in range(4000):
        a, _, b = TASKS[1].train_prompt(index).text.removesuffix("=").partition("+")
        counts[int(a[-1])] += 1
        counts[int(b[-1])] += 1
    # 8,000 last digits: 800 each with a standard deviation of 27; five of those.
    assert all(abs(count - 800) < 135 for count in counts)


# ------------------------------------------------------------------------------------------------------- verifying


def verify(text, answer="6912"):
    return ArithmeticTask().verify(text, Prompt(id=0, task="arithmetic", text="1234+5678=", answer=answer))


def test_a_right_answer_with_wrong_working_is_rewarded():
    assert verify("nonsense;#6912").reward == 1.0


def test_the_answer_is_what_follows_the_last_hash():
    assert verify("#6912;#1").reward == 0.0
    assert verify("#1;#6912").reward == 1.0
    assert verify("#6912\n").reward == 1.0


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("6912", "no '#'"),
        ("", "no '#'"),
        ("1=1;#", "no integer"),
        ("#6912;", "no integer"),
        ("#06912", "no integer"),
        ("#+6912", "no integer"),
        ("#6_912", "no integer"),
        ("#6912.0", "no integer"),
        ("#٦٩١٢", "no integer"),  # int() would read these digits
        ("#-0", "no integer"),
    ],
)
def test_a_completion_without_a_canonical_integer_is_unparseable(text, detail):
    score = verify(text)
    assert (score.reward, score.status) == (0.0, Status.UNPARSEABLE)
    assert detail in score.detail


@pytest.mark.parametrize("text", ["#6913", "#-6912", "#" + "9" * 100_000])
def test_a_wrong_integer_of_any_length_is_scored_zero(text):
    score = verify(text)
    assert (score.reward, score.status) == (0.0, Status.SCORED)


def test_a_prompt_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="needs its answer"):
        verify("#1", answer=None)


# ------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("options", [{"operation": "add", "digits": 2}, {"operation": "multiply", "digits": 3}])
def test_held_out_and_20000_training_prompts_are_disjoint_up_to_commutation(options):
    task = ArithmeticTask(**options)
    held_out = {twin_of(prompt.text) for prompt in task.held_out(1000)}
    train = {twin_of(task.train_prompt(index).text) for index in range(20_000)}
    assert len(held_out) > 200
    assert len(train) > 3000
    assert not held_out & train


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.operation}-{task.num_problems}")
def test_check_disjoint_passes_for_every_operation(task):
    check_disjoint(task, range(1000), held_out_count=300)


def test_check_disjoint_names_a_problem_on_both_sides():
    class Leaky(ArithmeticTask):
        def train_prompt(self, index):
            a, _, b = self.held_out(3)[2].text.removesuffix("=").partition("+")
            return self._prompt(f"{b}+{a}=", index)

    with pytest.raises(AssertionError, match=r"training prompt 5 .* is held out as"):
        check_disjoint(Leaky(), [5])


def test_in_a_small_space_the_two_sides_are_all_the_problems():
    task = ArithmeticTask(operation="multiply", digits=1)
    held_out = {twin_of(prompt.text) for prompt in task.held_out(1000)}
    train = {twin_of(task.train_prompt(index).text) for index in range(3000)}
    assert held_out | train == {(a, b) for a in range(10) for b in range(a, 10)}
    assert not held_out & train


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.operation}-{task.num_problems}")
def test_held_out_prompts_are_distinct_up_to_commutation_and_start_with_those_of_a_smaller_count(task):
    many, few = task.held_out(200), task.held_out(20)
    assert len({canonical(prompt.text) for prompt in many}) == len(many)
    assert many[: len(few)] == few
    assert [prompt.id for prompt in many] == list(range(len(many)))


def test_fewer_held_out_prompts_come_when_there_are_no_more():
    assert 0 < len(ArithmeticTask(digits=1).held_out(1000)) < 55


def test_about_the_asked_fraction_is_held_out():
    task = ArithmeticTask(digits=2, held_out_fraction=0.25)
    # 4,095 problems up to commutation: 1,024 with a standard deviation of 28; five of those.
    assert abs(len(task.held_out(5000)) - 1024) < 140


def test_the_split_does_not_depend_on_the_seed_but_the_draws_do():
    one, two = ArithmeticTask(digits=2, seed=1), ArithmeticTask(digits=2, seed=2)
    assert {canonical(p.text) for p in one.held_out(5000)} == {canonical(p.text) for p in two.held_out(5000)}
    assert one.held_out(20) != two.held_out(20)
    assert [one.train_prompt(i).text for i in range(20)] != [two.train_prompt(i).text for i in range(20)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12+34=", "34+12="),
        ("12*34=", "34*12="),
        ("3+4*2-5%7=", "4+3*2-5%7="),
        ("3-4+5%7=", "5-4+3%7="),
        ("1*2*3+4-5%7=", "3*1*2-5+4%7="),
    ],
)
def test_problems_that_differ_by_commutation_have_one_canonical_form(one, other):
    assert canonical(one) == canonical(other)
    assert evaluate(one) == evaluate(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12+34=", "12*34="),
        ("3-4%7=", "4-3%7="),
        ("3-4+5%7=", "3+4-5%7="),
        ("1*2+3%7=", "3*2+1%7="),
        ("1+2%7=", "1+2%8="),
        ("1+2*3%7=", "1*2+3%7="),
    ],
)
def test_different_problems_have_different_canonical_forms(one, other):
    assert canonical(one) != canonical(other)


def test_a_canonical_form_never_joins_problems_of_different_value():
    # All 243 chains of two operations modulo 3.
    task = ArithmeticTask(operation="modular_chain", terms=2, modulus=3)
    answers = {}
    for number in range(task.num_problems):
        text = task._problem(number)
        answers.setdefault(canonical(text), set()).add(evaluate(text))
    assert 50 < len(answers) < task.num_problems == 243
    assert all(len(values) == 1 for values in answers.values())


# ----------------------------------------------------------------------------------------------------- determinism


def test_prompts_are_the_same_in_another_process_with_another_hash_seed():
    code = (
        "import json; from sapo.tasks import ArithmeticTask as T\n"
        "ts = [T(seed=3), T(operation='modular_chain', seed=3)]\n"
        "print(json.dumps([[t.train_prompt(i).text for i in (0, 1, 10**18)] + "
        "[p.text for p in t.held_out(5)] for t in ts]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [
        [task.train_prompt(i).text for i in (0, 1, 10**18)] + [p.text for p in task.held_out(5)]
        for task in (ArithmeticTask(seed=3), ArithmeticTask(operation="modular_chain", seed=3))
    ]
    assert json.loads(done.stdout) == here


def test_the_first_prompts_are_those_of_every_earlier_version():
    # Recorded when the task was written: a change here would make old runs unrepeatable.
    assert [ArithmeticTask(seed=0).train_prompt(i).text for i in range(3)] == RECORDED_TRAIN
    assert [p.text for p in ArithmeticTask(seed=0).held_out(3)] == RECORDED_HELD_OUT


RECORDED_TRAIN = ["1353+8552=", "1103+7495=", "8201+5158="]
RECORDED_HELD_OUT = ["7675+4122=", "8084+5817=", "5967+9732="]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"operation": "multiplication"}, ["must be one of", "'multiplication'", "did you mean 'multiply'"]),
        ({"digits": 0}, ["digits", "1 or more", "got 0", "default is 4"]),
        ({"digits": 2.0}, ["digits", "whole number", "got 2.0"]),
        ({"digits": True}, ["digits", "whole number", "got True"]),
        ({"digits": 200}, ["2**448", "digits=200", "smaller"]),
        ({"digits": 10**12}, ["2**448", "digits=1000000000000"]),
        ({"operation": "modular_chain", "terms": 0}, ["terms", "1 or more", "got 0"]),
        ({"operation": "modular_chain", "modulus": 1}, ["modulus", "2 or more", "got 1"]),
        ({"operation": "modular_chain", "terms": 10**12}, ["2**448", "terms=1000000000000"]),
        ({"operation": "modular_chain", "digits": 3}, ["digits is no option", "digits=3", "leave it out"]),
        ({"operation": "add", "modulus": 3}, ["modulus is no option", "modulus=3"]),
        ({"held_out_fraction": 0}, ["between 0.01 and 0.99", "got 0", "1/16"]),
        ({"held_out_fraction": 1.0}, ["between 0.01 and 0.99", "got 1.0"]),
        ({"held_out_fraction": "0.1"}, ["between 0.01 and 0.99", "got '0.1'"]),
    ],
)
def test_a_wrong_option_is_refused_with_the_rule_the_value_and_the_way_out(options, parts):
    with pytest.raises(TaskError) as caught:
        ArithmeticTask(**options)
    assert isinstance(caught.value, ValueError)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(("fraction", "side"), [(0.01, "held-out"), (0.99, "training")])
def test_a_space_without_both_sides_is_refused(fraction, side):
    # 12 problems, 7 up to commutation.
    with pytest.raises(TaskError, match=f"got no {side} problem among the 12 of modular_chain"):
        ArithmeticTask(operation="modular_chain", terms=1, modulus=2, held_out_fraction=fraction)


def test_nearly_all_of_a_held_out_set_too_large_to_list_is_refused(monkeypatch):
    task = ArithmeticTask(digits=2)
    there_are = len(task.held_out(5000))
    monkeypatch.setattr("sapo.tasks.generated.arithmetic.MAX_LISTED_PROBLEMS", 0)
    assert len(task.held_out(there_are // 2)) == there_are // 2
    with pytest.raises(TaskError, match=f"got {there_are + 1}, and .* ask for fewer"):
        task.held_out(there_are + 1)


def test_a_negative_index_is_refused():
    with pytest.raises(TaskError, match="0 or more; got -1"):
        ArithmeticTask().train_prompt(-1)


def test_tasks_that_differ_have_names_that_differ():
    names = [task.name for task in TASKS]
    assert len(set(names)) == len(names)
    assert (names[1], names[5]) == ("add4", "modular_chain3_mod7")
    assert TASKS[1].train_prompt(0).task == TASKS[1].held_out(1)[0].task == "add4"
    assert ArithmeticTask(name="sums").train_prompt(0).task == "sums"


def test_arithmetic_is_a_task_that_can_write_worked_examples():
    assert isinstance(ArithmeticTask(), Task)
    assert isinstance(ArithmeticTask(), WorkedTask)
