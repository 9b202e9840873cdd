"""The audit of reasoning-gym: which of its data sets may be used, and why others may not."""

import json
import types

import pytest

from sapo.errors import TaskError
from sapo.tasks import make_task
from sapo.tasks.generated.reasoning_audit import REFUSED, check_dataset, find_evaluator
from sapo.tasks.generated.reasoning_scoring import make_dataset
from support.reasoning_cases import in_another_process, knobs

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_scorers_that_evaluate_the_answer_are_found():
    # By reading the sources of version 0.1.25 for eval( and parse_expr( in score_answer.
    by_eval = {"binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion", "bitwise_arithmetic"}
    by_sympy = {"countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication"}
    found = {
        name: find_evaluator(made.score_answer, made) for name, (made, _) in reasoning_gym.factory.DATASETS.items()
    }
    assert {name for name, evaluator in found.items() if evaluator == "eval"} == by_eval
    assert {name for name, evaluator in found.items() if evaluator and "sympy" in evaluator} == by_sympy
    assert {name for name, evaluator in found.items() if evaluator} == by_eval | by_sympy


SCORERS = """
import sympy as algebra
import dataclasses
import json

class Helper:
    def run(self, text):
        return [eval(part) for part in text]

class Behind:
    def score_answer(self, answer, entry):
        return self._read(answer)
    @staticmethod
    def _read(answer):
        return (lambda: Helper().run(answer))()

class Algebra:
    def score_answer(self, answer, entry):
        return algebra.simplify(answer)

class Late:
    def score_answer(self, answer, entry):
        from sympy import sympify
        return sympify(answer)

class Harmless:
    def score_answer(self, answer, entry):
        return json.loads(answer).eval()
    def generate(self):
        return eval("1")
"""


def test_an_evaluator_is_found_behind_helpers_methods_and_inner_functions():
    module = types.ModuleType("reasoning_gym.made_up")
    exec(SCORERS, vars(module))
    found = {
        name: find_evaluator(getattr(module, name).score_answer, getattr(module, name))
        for name in ("Behind", "Algebra", "Late", "Harmless")
    }
    assert found == {"Behind": "eval", "Algebra": "sympy (algebra)", "Late": "sympy (sympy)", "Harmless": None}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("propositional_logic", ["its own reference answer scores 0"]),
        ("composite", ["write them as tasks with weights"]),
        ("knight_swap", ["PYTHONHASHSEED"]),
        ("n_queens", ["evaluates text by eval"]),
        ("puzzle24", ["evaluates text by sympy"]),
        ("game_of_life_halting", ["junk ('junk') scores 1 on item 0"]),
        ("time_intervals", ["scores 0.95 on item 0", "may score 0.01"]),
        ("boxnet", ["item 0 has no reference answer in text"]),
    ],
)
def test_an_unsound_dataset_is_refused_with_the_reason_or_the_figure(name, parts):
    with pytest.raises(TaskError) as caught:
        make_task("reasoning_gym", seed=0, dataset=name)
    message = str(caught.value)
    assert message.startswith(f"reasoning-gym's {name} cannot be used: ")
    assert message.endswith("list_functions, codeio")
    for part in parts:
        assert part in message


def test_a_dataset_whose_reference_scores_less_than_1_is_refused(monkeypatch):
    made = type(make_dataset("lcm", knobs()))
    check_dataset("lcm", knobs())
    monkeypatch.setattr(made, "score_answer", lambda self, answer, entry: 0.5)
    with pytest.raises(TaskError, match=r"the reference answer of item 0 scores 0\.5, and must score 1"):
        check_dataset("lcm", knobs())


def test_propositional_logic_does_score_its_own_reference_0():
    dataset = reasoning_gym.create_dataset("propositional_logic", seed=0, size=20)
    assert {dataset.score_answer(entry["answer"], entry) for entry in dataset} == {0.0}


ITEMS = """
import json, reasoning_gym, sys
made = {name: reasoning_gym.create_dataset(name, seed=0, size=5) for name in json.loads(sys.argv[1])}
print(json.dumps({name: [[entry["question"], entry["answer"]] for entry in made[name]] for name in made}))
"""


def test_questions_refused_for_the_hash_seed_do_depend_on_it():
    names = [name for name, reason in REFUSED.items() if "PYTHONHASHSEED" in reason]
    assert len(names) == 3
    one, other = (in_another_process(ITEMS, json.dumps(names), hash_seed) for hash_seed in "12")
    for name in names:
        assert one[name] != other[name]
