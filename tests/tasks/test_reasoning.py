"""Tasks of reasoning-gym: questions that repeat, sides that do not meet, and scores that can be trusted."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from sapo.data import Completion, Prompt, Status
from sapo.errors import TaskError
from sapo.tasks import ReasoningGymTask, Task, make_task, score_completions
from sapo.tasks.generated.reasoning import canonical_sum
from sapo.tasks.generated.reasoning_audit import SOUND
from sapo.tasks.generated.reasoning_scoring import (
    ReasoningGymJudge,
    evaluate,
    extract_answer,
    generate_entry,
    make_dataset,
)
from sapo.tasks.workers.wire import Home
from support.reasoning_cases import in_another_process, knobs

reasoning_gym = pytest.importorskip("reasoning_gym")

SMALL_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}

# Seconds for one question of some; the others take milliseconds.
SLOW = {"zebra_puzzles", "countdown"}


# ---------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", SOUND)
def test_the_reference_answer_scores_1_in_every_format_and_junk_at_most_a_hundredth(name):
    task = make_task(f"reasoning_gym/{name}", seed=0, held_out_fraction=0.5)
    assert isinstance(task, Task)
    for index in range(2 if name in SLOW else 12):
        prompt = task.train_prompt(index)
        for text in ("{}", "Hm, {x}. <answer>{}</answer>", "<think>no</think>{}"):
            score = task.verify(text.replace("{}", prompt.answer), prompt)
            assert (score.reward, score.status, score.answer) == (1.0, Status.SCORED, prompt.answer.strip())
        for junk in ("#", "~ ~", "{}", "[]", "\x00", "(((", "?" * 300):
            score = task.verify(junk, prompt)
            if junk != prompt.answer:
                assert score.reward <= 0.01
        for nothing in ("", "  \n", "<answer></answer>", "<think>" + prompt.answer + "</think>"):
            score = task.verify(nothing, prompt)
            assert (score.reward, score.status) == (0.0, Status.UNPARSEABLE)


def test_partial_credit_can_be_left_out():
    strict = make_task("reasoning_gym/mini_sudoku", seed=0, partial_credit=False)
    lenient = make_task("reasoning_gym/mini_sudoku", seed=0)
    prompt = strict.train_prompt(0)
    first, *rest = prompt.answer.split("\n")
    wrong = "\n".join([" ".join(reversed(first.split())), *rest])
    assert 0 < lenient.verify(wrong, prompt).reward < 1
    assert strict.verify(wrong, prompt).reward == 0
    assert strict.verify(prompt.answer, prompt).reward == 1


@pytest.mark.parametrize(
    ("answer_format", "text", "answer"),
    [
        ("auto", "7 or <answer>8</answer> or <answer> 9\n</answer>!", "9"),
        ("auto", r"<answer>8</answer> \boxed{9}", "8"),
        ("auto", r"so \boxed{7}, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("auto", r"\boxed{1} and \boxed{2", "1"),
        ("auto", "  7 ", "7"),
        ("auto", "<think><answer>3</answer></think> 7", "7"),
        ("tag", "7", None),
        ("tag", "<answer>1\n2</answer>", "1\n2"),
        ("boxed", "<answer>7</answer>", None),
        ("boxed", r"\boxed{\{a, b\}}", r"\{a, b\}"),
        ("text", "<answer>7</answer>", "<answer>7</answer>"),
    ],
)
def test_the_answer_is_found_where_its_format_says(answer_format, text, answer):
    assert extract_answer(text, answer_format) == answer


def test_a_right_word_of_nine_letters_with_more_behind_it_is_not_right():
    # The package adds 1/9 nine times, which is 1.0000000000000002, and then does not take its 0.2 off.
    judge = ReasoningGymJudge("spell_backward", knobs(min_word_len=9, max_word_len=9))
    entry = judge.entry(0)
    assert make_dataset("spell_backward", judge.knobs).score_answer(entry["answer"] + "xyz", entry) > 1
    prompt = Prompt(id=0, task="t", text="", metadata={"item": 0})
    assert judge(entry["answer"] + "xyz", prompt).reward == 0.8
    assert judge(entry["answer"].upper(), prompt).reward == 1.0


def test_an_answer_on_which_the_scorer_fails_is_unparseable():
    judge = ReasoningGymJudge("prime_factorization", knobs())
    prompt = Prompt(id=0, task="t", text="", metadata={"item": 0})
    with pytest.raises(ValueError):
        make_dataset("prime_factorization", judge.knobs).score_answer("junk", judge.entry(0))
    score = judge("junk", prompt)
    assert (score.reward, score.status) == (0.0, Status.UNPARSEABLE)
    assert "ValueError" in score.detail


@pytest.mark.parametrize("answer", ["1e999999999", "7" * 20_000])
def test_an_answer_that_would_take_all_memory_or_time_never_reaches_the_scorer(answer):
    judge = ReasoningGymJudge("coin_flip", knobs())
    score = judge(answer, Prompt(id=0, task="t", text="", metadata={"item": 0}))
    assert score.status is Status.UNPARSEABLE


def test_a_judge_goes_to_another_process_and_judges_there_the_same():
    judge = ReasoningGymJudge("list_functions", knobs(), "tag")
    text = f"<answer>{judge.entry(5)['answer']}</answer>"
    code = (
        "import pickle, sys\nfrom sapo.data import Prompt\n"
        "judge, text = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "prompt = Prompt(id=0, task='t', text='', metadata={'item': 5})\n"
        "print(judge(text, prompt).reward, judge('<answer>[]</answer>', prompt).reward)"
    )
    argument = pickle.dumps((judge, text)).hex()
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0", "0.0"]


# -------------------------------------------------------------------------------------------------------- countdown


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2 - 3 - 4", -5),
        ("24/4/2", 3),
        ("1/3", Fraction(1, 3)),
        ("-(2+3)*--4", -20),
        (" 2\n+ 3 ", 5),
        ("007", 7),
    ],
)
def test_an_expression_has_its_exact_value(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2+", "2 3", "2**3", "9**9**9", "2//3", "(2", "2)", "2.5", "1e9", "x", "f(2)", "２+3", "2=2"]
    + ["__import__('os')", "(" * 400 + "1" + ")" * 400, "-" * 300 + "1", "1+" * 300 + "1", "9" * 501],
)
def test_what_is_no_plain_expression_is_refused(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


def test_countdown_is_scored_as_the_package_scores_it():
    dataset = make_dataset("countdown", knobs())
    judge = ReasoningGymJudge("countdown", knobs())
    for item in range(8):
        entry = judge.entry(item)
        prompt = Prompt(id=0, task="t", text="", metadata={"item": item})
        reference, numbers = entry["answer"], entry["metadata"]["numbers"]
        answers = [reference, f"({reference})", "+".join(map(str, numbers)), f"{reference}+1", "1", "1/0", "2 3", "no"]
        for answer in [*answers, "*".join(map(str, reversed(numbers)))]:
            assert judge(answer, prompt).reward == dataset.score_answer(answer, entry), answer


def test_a_task_s_answers_are_judged_in_a_worker(monkeypatch):
    def here(judge, text, prompt):
        raise AssertionError("judged in the process of the run")

    monkeypatch.setattr(ReasoningGymJudge, "__call__", here)
    task = make_task("reasoning_gym/chain_sum", seed=0)
    prompt = task.train_prompt(0)
    texts = [prompt.answer, "seven", "", prompt.answer]
    scored = score_completions(task, prompt, [Completion((), (), "stop", text) for text in texts])
    # By the package: the reference is worth 1, what does not hold it 0.01 or 0; nothing at all is no answer.
    assert [c.score.status for c in scored] == [Status.SCORED, Status.SCORED, Status.UNPARSEABLE, Status.SCORED]
    assert [c.score.reward == 1.0 for c in scored] == [True, False, False, True]


SLOW_JUDGE = """
import time
from sapo.tasks.generated.reasoning_scoring import ReasoningGymJudge

class SlowJudge(ReasoningGymJudge):
    def __call__(self, text, prompt):
        if text == "slow":
            time.sleep(600)
        return super().__call__(text, prompt)
"""


def test_an_answer_that_keeps_its_scorer_busy_costs_that_completion(tmp_path, monkeypatch):
    (tmp_path / "slow_judge_of_a_test.py").write_text(SLOW_JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from slow_judge_of_a_test import SlowJudge

    task = make_task("reasoning_gym/chain_sum", seed=0)
    assert task.verifier.deadline == 10.0
    judge = SlowJudge("chain_sum", task._judge.knobs)
    task.verifier = dataclasses.replace(task.verifier, spec=judge, deadline=0.5, home=Home.here())
    prompt = task.train_prompt(0)
    scored = score_completions(task, prompt, [Completion((), (), "stop", t) for t in ("slow", prompt.answer)])
    assert [c.score.status for c in scored] == [Status.VERIFIER_ERROR, Status.SCORED]
    assert scored[0].score.detail == "TimeoutError: not scored within 0.5 s"


def test_an_answer_to_countdown_is_never_evaluated_as_code(tmp_path, monkeypatch):
    from reasoning_gym.games import countdown

    called = []
    monkeypatch.setattr(countdown, "parse_expr", lambda *a, **k: called.append(a))
    task = make_task("reasoning_gym/countdown", seed=0)
    prompt = task.train_prompt(0)
    target = tmp_path / "owned"
    for answer in (f"__import__('os').system('touch {target}')", f"open('{target}','w')", "9**9**9**9", prompt.answer):
        task._judge(answer, prompt)
    assert not called
    assert not target.exists()


def test_a_question_whose_program_failed_is_on_neither_side(monkeypatch):
    task = make_task("reasoning_gym/codeio", seed=0)
    item = task.train_prompt(0).metadata["item"]
    entry = dict(task._judge.entry(item))
    failed = {**entry, "metadata": {**entry["metadata"], "input_data": {}, "output_data": {}}}
    made = ReasoningGymJudge.entry
    monkeypatch.setattr(ReasoningGymJudge, "entry", lambda judge, i: failed if i == item else made(judge, i))
    assert task.train_prompt(0).metadata["item"] != item


# ------------------------------------------------------------------------------------------------------- repeatable


def test_a_prompt_is_a_function_of_seed_and_index_and_far_ones_cost_no_more():
    first, again = (make_task("reasoning_gym/chain_sum", seed=3) for _ in range(2))
    indices = [100_000, 0, 7, 10**12]
    assert [first.train_prompt(i) for i in indices] == [again.train_prompt(i) for i in reversed(indices)][::-1]
    assert first.train_prompt(7).id == 7
    other = make_task("reasoning_gym/chain_sum", seed=4)
    assert [first.train_prompt(i).text for i in range(9)] != [other.train_prompt(i).text for i in range(9)]


QUESTIONS = """
import json, random, sys
from sapo.tasks import make_task
random.seed(99)
asked = {}
for name, count in json.loads(sys.argv[1]).items():
    task = make_task(f"reasoning_gym/{name}", seed=1, held_out_fraction=0.5)
    asked[name] = [[p.text, p.answer] for p in map(task.train_prompt, range(count))]
print(json.dumps(asked))
"""


def test_questions_are_the_same_in_another_process_with_another_hash_seed():
    # list_functions draws from the global generator, knights_knaves and zebra_puzzles go through sets.
    counts = {"knights_knaves": 20, "list_functions": 40, "letter_counting": 20, "mini_sudoku": 5, "zebra_puzzles": 1}
    one, other = (in_another_process(QUESTIONS, json.dumps(counts), hash_seed) for hash_seed in "12")
    assert one == other
    for name in ("list_functions", "letter_counting"):
        task = make_task(f"reasoning_gym/{name}", seed=1, held_out_fraction=0.5)
        prompts = [task.train_prompt(i) for i in range(counts[name])]
        assert [[prompt.text, prompt.answer] for prompt in prompts] == one[name]


def test_generating_a_question_leaves_the_global_generators_as_they_were():
    import random

    import numpy

    random.seed(5)
    numpy.random.seed(5)
    expected = random.Random(5).random(), numpy.random.RandomState(5).random_sample()
    generate_entry.__wrapped__("list_functions", knobs(), 3)
    assert (random.random(), numpy.random.random_sample()) == expected


# -------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("seed", [0, 1])
def test_no_sum_of_a_small_space_is_on_both_sides_up_to_the_order_of_terms(seed):
    task = make_task("reasoning_gym/chain_sum", seed=seed, **SMALL_SUMS)
    held_out = {canonical_sum(re.search(r": (.*) =", p.text)[1]) for p in task.held_out(999)}
    train = {canonical_sum(re.search(r": (.*) =", task.train_prompt(i).text)[1]) for i in range(3000)}
    # 55 unordered pairs for the sums and 100 ordered ones for the differences; a + 0 and a - 0 have the same terms.
    assert len(held_out | train) == 55 + 100 - 10
    assert not held_out & train
    assert len(task.held_out(999)) == len(held_out)


def test_the_held_out_side_does_not_depend_on_the_seed():
    sides = [
        {p.text for p in make_task("reasoning_gym/gcd", seed=seed, min_value=1, max_value=12).held_out(999)}
        for seed in (0, 1)
    ]
    numbers = [{tuple(sorted(re.findall(r"\d+", text))) for text in side} for side in sides]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) > 5


def test_one_equation_in_three_wordings_is_on_one_side():
    task = make_task("reasoning_gym/simple_equations", seed=0, max_terms=2, max_value=2)

    def equations(prompts):
        return {re.sub(r"[a-z]", "x", re.search(r"[^:]*$", prompt.text)[0]) for prompt in prompts}

    train = [task.train_prompt(i) for i in range(300)]
    assert len({prompt.text for prompt in train}) > len(equations(train))
    assert not equations(train) & equations(task.held_out(99))


def test_held_out_questions_are_asked_for_again_without_being_drawn_again():
    task = make_task("reasoning_gym/chain_sum", seed=0)
    few = task.held_out(5)
    assert task.held_out(20)[:5] == few
    draws = task._draws
    assert task.held_out(5) == few
    assert task._draws == draws
    assert [prompt.id for prompt in task.held_out(20)] == list(range(20))


def test_examples_are_training_questions_and_the_same_whatever_the_seed():
    one, other = (make_task("reasoning_gym/chain_sum", seed=seed, **SMALL_SUMS) for seed in (0, 1))
    shots = one.shots(4)
    assert shots == other.shots(4)
    assert len(dict(shots)) == 4
    assert not {question for question, _ in shots} & {prompt.text for prompt in one.held_out(999)}
    with pytest.raises(TaskError, match="got shots=500"):
        one.shots(500)


def test_the_template_is_around_the_question():
    plain = make_task("reasoning_gym/gcd", seed=0)
    worded = make_task("reasoning_gym", seed=0, dataset="gcd", template="{prompt}\nUse <answer></answer>.", name="mine")
    assert worded.train_prompt(3).text == plain.train_prompt(3).text + "\nUse <answer></answer>."
    assert (plain.name, worded.name, worded.train_prompt(3).task) == ("gcd", "mine", "mine")


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["needs the option 'dataset'"]),
        ({"dataset": "chain_summ"}, ["got 'chain_summ'", "did you mean 'chain_sum'?", "as chain_sum, gcd"]),
        ({"dataset": "chain_sum", "min_term": 2}, ["min_terms, max_terms", "did you mean 'min_terms'?"]),
        ({"dataset": "chain_sum", "min_terms": 5, "max_terms": 2}, ["max_terms must be >= min_terms", "change them"]),
        ({"dataset": "chain_sum", "min_terms": "a"}, ["refuses its settings", '"min_terms": "a"']),
        ({"dataset": "chain_sum", "answer_format": "tags"}, ["auto, text, tag, boxed", "did you mean 'tag'?"]),
        ({"dataset": "chain_sum", "template": "Q"}, ["template must hold {prompt}"]),
        ({"dataset": "chain_sum", "held_out_fraction": 1}, ["between 0.01 and 0.99", "got 1"]),
        ({"dataset": "chain_sum", "size": 0}, ["size must be a whole number of items", "got 0"]),
        ({"dataset": "chain_sum", "size": 1}, ["both sides must have questions"]),
        ({"dataset": "word_ladder"}, ["word_ladder refuses its settings", "size too large"]),
    ],
)
def test_a_mistake_is_one_line(options, parts):
    with pytest.raises(TaskError) as caught:
        make_task("reasoning_gym", seed=0, **options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_negative_index_is_refused():
    with pytest.raises(TaskError, match="0 or more; got -1"):
        make_task("reasoning_gym/gcd", seed=0).train_prompt(-1)


def test_a_missing_package_is_named_with_the_command_that_adds_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=re.escape("pip install 'sapo-rl[tasks]'")):
        ReasoningGymTask("chain_sum")


def test_a_name_with_a_slash_is_of_reasoning_gym_only():
    with pytest.raises(TaskError, match="got 'arithmetic/add'"):
        make_task("arithmetic/add", seed=0)
