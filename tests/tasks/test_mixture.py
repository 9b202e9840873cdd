"""The mixture: exact shares, nothing skipped or repeated, no state."""

from collections import Counter
from fractions import Fraction
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.errors import TaskError
from sapo.tasks import make_task, prompts_for_step
from sapo.tasks.mixture import MAX_PERIOD


def mixture(weights):
    """Tasks stand for themselves here: the mixture only hands them back."""
    return [(f"task {i}", weight) for i, weight in enumerate(weights)]


def check_exact(weights, prompts_per_step, steps, first=0):
    """Run the steps and hold every running total against its ideal share, in exact arithmetic."""
    total = sum(Fraction(str(weight)) for weight in weights)
    seen = None
    for step in range(first, first + steps):
        chosen = prompts_for_step(mixture(weights), step, prompts_per_step)
        assert len(chosen) == prompts_per_step
        if seen is None:  # the first step after a resume tells where each task stands
            seen = {name: min((i for n, i in chosen if n == name), default=None) for name, _ in mixture(weights)}
        for name, index in chosen:
            if seen[name] is None:
                seen[name] = index
            assert index == seen[name]  # none skipped, none repeated
            seen[name] += 1
        for name, weight in mixture(weights):
            ideal = (step + 1) * prompts_per_step * Fraction(str(weight)) / total
            if seen[name] is not None:
                assert abs(seen[name] - ideal) < 1
    return seen


def test_dividing_weights_give_the_same_shares_in_every_batch():
    for step in range(100):
        chosen = prompts_for_step(mixture([2, 1, 1]), step, 32)
        assert Counter(name for name, _ in chosen) == {"task 0": 16, "task 1": 8, "task 2": 8}


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed (extra tasks)")
def test_three_real_tasks_two_to_one_to_one_have_that_ratio_in_every_batch(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"problem": "p{i}", "answer": {i}}}\n' for i in range(40)))
    tasks = [
        make_task("file", seed=0, path=path, prompt_field="problem", name="rows"),
        make_task("reasoning_gym/chain_sum", seed=0, name="sums"),
        make_task("arithmetic", seed=0, name="add"),
    ]
    weighted = list(zip(tasks, (2, 1, 1), strict=True))
    asked = {task.name: [] for task in tasks}
    for prompts_per_step in (4, 8, 36):
        for step in range(10):
            chosen = prompts_for_step(weighted, step, prompts_per_step)
            prompts = [task.train_prompt(index) for task, index in chosen]
            share = prompts_per_step // 4
            assert Counter(prompt.task for prompt in prompts) == {"rows": 2 * share, "sums": share, "add": share}
            if prompts_per_step == 8:
                for prompt in prompts:
                    asked[prompt.task].append(prompt)
    # Each task was asked for its own 0, 1, 2, ...: an epoch of the file has each of its rows once.
    assert {name: [prompt.id for prompt in prompts] for name, prompts in asked.items()} == {
        "rows": list(range(40)),
        "sums": list(range(20)),
        "add": list(range(20)),
    }
    epoch = [prompt.text for prompt in asked["rows"][: tasks[0].num_train]]
    assert len(set(epoch)) == tasks[0].num_train


def test_a_single_task_gets_every_index():
    chosen = [pair for step in range(5) for pair in prompts_for_step(mixture([0.3]), step, 4)]
    assert chosen == [("task 0", index) for index in range(20)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_running_totals_stay_within_one_of_the_ideal(weights, prompts_per_step):
    check_exact(weights, prompts_per_step, steps=60)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_float_weights_are_exact_when_no_task_is_rare(weights):
    check_exact(weights, prompts_per_step=600, steps=5)


@pytest.mark.parametrize("weights", [[100, 1, 1, 1], [1, 2, 3, 5, 7, 11, 13], [0.9, 0.05, 0.05], [50, 49, 1]])
@pytest.mark.parametrize("prompts_per_step", [1, 2, 3, 32])
def test_rare_tasks_are_exact_too(weights, prompts_per_step):
    check_exact(weights, prompts_per_step, steps=300)


def test_every_whole_period_is_exactly_proportional():
    chosen = [name for step in range(103) for name, _ in prompts_for_step(mixture([100, 1, 2]), step, 1)]
    assert Counter(chosen) == {"task 0": 100, "task 1": 1, "task 2": 2}


def test_tenths_are_exact_tenths():
    # In binary floats 0.1 + 0.2 is not 0.3; the shares of 10 are 1, 2 and 7 in every step all the same.
    for step in (0, 1, 10**15):
        chosen = prompts_for_step(mixture([0.1, 0.2, 0.7]), step, 10)
        assert Counter(name for name, _ in chosen) == {"task 0": 1, "task 1": 2, "task 2": 7}


@pytest.mark.parametrize("weights", [[3, 2, 2], [40, 1, 1]])
def test_a_far_step_is_as_exact_as_the_first(weights):
    check_exact(weights, prompts_per_step=8, steps=20, first=10**12)


@pytest.mark.parametrize(
    ("weights", "step", "prompts_per_step", "parts"),
    [
        ([], 0, 8, ["at least one task"]),
        ([1, 0], 0, 8, ["must be positive", "got 0", "leave the task out"]),
        ([1, -2.5], 0, 8, ["must be positive", "got -2.5"]),
        ([1, float("nan")], 0, 8, ["positive and finite", "got nan"]),
        ([1, float("inf")], 0, 8, ["positive and finite", "got inf"]),
        ([1], -1, 8, ["0 or more", "got -1"]),
        ([1], 0, 0, ["at least 1", "got 0 and 0"]),
        ([MAX_PERIOD, 1], 0, 8, [f"within {MAX_PERIOD}", "[100000, 1]", "more prompts per step"]),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(weights, step, prompts_per_step, parts):
    with pytest.raises(TaskError) as caught:
        prompts_for_step(mixture(weights), step, prompts_per_step)
    for part in parts:
        assert part in str(caught.value)
