"""How a recipe writes a verifier: names, options, weighted sums."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import yaml

from sapo.data import Completion, Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks import VERIFIERS, FileTask, load_verifier, make_task, score_completions
from sapo.tasks.verifiers import Isolated, build_verifier, needs_answer
from sapo.tasks.verifiers.base import deadline_of, is_pure
from sapo.tasks.verifiers.registry import parse_spec
from support.answers import judge

# ------------------------------------------------------------------------------------------------------- how to write


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_every_name_loads_and_needs_at_most_the_options_it_says(name):
    options = {"regex": {"pattern": "a"}, "format": {"pattern": "a"}, "length": {"limit": 9}}.get(name, {})
    verifier = load_verifier({"name": name, **options})
    assert isinstance(verifier, Isolated) == (
        name in ("math", "choice_or_math", "regex", "format", "json_schema", "code")
    )
    # A program may do another thing each time it runs.
    assert is_pure(build_verifier({"name": name, **options})) == (name != "code")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "must be one of exact, last_number, .* got 'maths'; did you mean 'math'"),
        ({"name": "boxed_integr"}, "did you mean 'boxed_integer'"),
        ({"pattern": "a"}, "a verifier's mapping must have a name; got {'pattern': 'a'}"),
        ({"name": 3}, "must have a name"),
        ({"name": "regex", "patern": "a"}, "takes the options .*pattern.*; got 'patern'; did you mean 'pattern'"),
        ({"name": "exact", "case": True}, "'exact' takes the options thinking_end, thinking_start; got 'case'"),
        ({"name": "regex"}, "'regex' needs the option 'pattern'"),
        ({"name": "length", "margin": 3}, "'length' needs the option 'limit'"),
        (
            {"name": "m:f", "dedline": 3},
            "'m:f' takes the options deadline, memory_gb; got 'dedline'; did you mean 'deadline'",
        ),
        ({"name": "m:f", "deadline": 0}, "deadline must be a positive number of seconds; got 0"),
        ({"name": "math", "deadline": "soon"}, "deadline must be a positive number of seconds; got 'soon'"),
        ({"name": "math", "deadline": float("inf")}, "deadline must be a positive number of seconds; got inf"),
        ({"name": "math", "weight": 2}, "a weight belongs to a verifier of a list"),
        ([], "a name, {name: ..., option: ...} or a list of these with weights; got \\[\\]"),
        (["math"], "or a list of these with weights; got \\['math'\\]"),
        (7, "got 7"),
        ([{"name": "exact", "weight": "big"}], "'exact': a weight must be a finite number; got 'big'"),
        ([{"name": "exact", "weight": 1e200}], "a weight must lie within .* got 1e.200"),
        ([{"name": "exact", "weight": float("nan")}], "a weight must be a finite number; got nan"),
        ({"name": "regex", "pattern": "(a"}, "must be a regular expression; got '\\(a': missing \\)"),
        ({"name": "regex", "pattern": ""}, "must be a regular expression; got ''"),
        ({"name": "regex", "pattern": "a", "mode": "match"}, "mode must be search or full; got 'match'"),
        ({"name": "regex", "pattern": "a", "group": 1}, "group must be one of the pattern's, \\[0\\]; got 1"),
        ({"name": "regex", "pattern": "(?P<x>a)", "group": "y"}, "\\[0, 1, 'x'\\]; got 'y'"),
        ({"name": "length", "limit": 0}, "limit must be an integer of at least 1; got 0"),
        ({"name": "length", "limit": 5, "margin": 6}, "margin must not exceed its limit; got 6 > 5"),
        ({"name": "boxed_integer", "minimum": 5, "maximum": 4}, "minimum must not exceed maximum; got 5 > 4"),
        ({"name": "boxed_integer", "maximum": "999"}, "maximum must be an integer; got '999'"),
        ({"name": "json_schema", "schema": {"type": "objekt"}}, "schema is wrong at .*'objekt'"),
        ({"name": "json_schema", "schema": "{}"}, "needs a schema, an object; got '{}'"),
    ],
)
def test_what_is_written_wrongly_is_refused_in_one_line(spec, message):
    with pytest.raises(TaskError, match=message) as caught:
        load_verifier(spec)
    assert "\n" not in str(caught.value)


def test_the_verifiers_of_a_recipe_in_yaml_reach_the_task(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "p{i}", "answer": "{i}"}}\n' for i in range(50)))
    written = yaml.safe_load(f"""
        path: {tmp_path}/rows.jsonl
        verifier:
          - {{name: last_number, weight: 0.9}}
          - {{name: format, pattern: "^<think>.*</think>", weight: 0.1}}
          - {{name: length, limit: 40, margin: 20, weight: 0.5}}
    """)
    task = make_task("file", seed=0, **written)
    texts = ["<think>hm</think> 7", "7", "<think>hm</think> 8", "so, " * 7 + "7", "no number"]
    scored = score_completions(
        task, Prompt(id=0, task="t", text="?", answer="7"), [Completion((1,), (0.0,), "stop", text) for text in texts]
    )
    # By hand: right 0.9, form 0.1, 29 characters are 9 of the 20 before the limit.
    expected = [1.0, 0.9, 0.1, 0.9 - 0.5 * 9 / 20, 0.0]
    assert [c.score.reward for c in scored] == pytest.approx(expected)
    assert [c.score.answer for c in scored] == ["7", "7", "8", "7", None]
    assert [c.score.status for c in scored] == [Status.SCORED] * 4 + [Status.UNPARSEABLE]
    assert scored[4].score.detail == "last_number: no number in the completion"
    assert scored[2].score.figures == {"last_number": 0.0, "format": 1.0, "length": 0.0}


PAGE = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text()


def test_the_recipe_on_the_page_about_verifiers_is_read_and_its_table_has_every_name():
    (written,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    specs = [task["verifier"] for task in yaml.safe_load(written)["tasks"]]
    assert [[term.name for term in parse_spec(spec)] for spec in specs] == [
        ["math"],
        ["regex"],
        ["my_rewards:judge"],
        ["math", "format", "length"],
    ]
    for spec in specs[:2] + specs[3:]:
        build_verifier(spec)
    assert set(re.findall(r"^\| `([^`]*)`", PAGE, re.MULTILINE)) == {*VERIFIERS, "module:function"}


@pytest.mark.parametrize("name", ["math", "regex", "format", "json_schema"])
def test_the_page_gives_the_deadlines_that_hold(name):
    (row,) = re.findall(rf"^\| `{name}` .*$", PAGE, re.MULTILINE)
    deadline = deadline_of(build_verifier({"name": name, **({"pattern": "a"} if "pattern" in row else {})}))
    assert f"`deadline` ({deadline:g})" in row


def test_a_users_function_may_be_a_term_of_a_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_terms.py").write_text("async def bonus(completion): return len(completion)")
    verifier = load_verifier([{"name": "my_terms:bonus", "weight": 0.5, "deadline": 7}, {"name": "math"}])
    assert verifier.deadline == 7 + deadline_of(build_verifier("math"))
    score = verifier(r"\boxed{2}", Prompt(id=0, task="t", text="?", answer="2"))
    assert score == Score(0.5 * 9 + 1, answer="2", figures={"my_terms:bonus": 9.0, "math": 1.0})


def test_an_error_in_a_term_is_one_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_terms.py").write_text("def bad(completion): raise ValueError('no')")
    verifier = load_verifier([{"name": "my_terms:bad"}, {"name": "format", "pattern": "a"}])
    score = verifier("a", Prompt(id=0, task="t", text="?"))
    assert score == Score(0.0, Status.VERIFIER_ERROR, "ValueError: no")


def test_the_same_verifier_twice_in_a_sum_has_two_figures():
    spec = [{"name": "format", "pattern": p, "weight": w} for p, w in [("a", 1), ("b", 2), ("c", 4)]]
    score = judge(spec, "a c")
    assert (score.reward, score.figures) == (5.0, {"format": 1.0, "format_2": 0.0, "format_3": 1.0})


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (0.6, 0.3, 0.1)])
def test_weights_that_sum_to_1_give_exactly_1_to_what_is_right_in_every_term_in_any_order(weights):
    # By hand: every term gives 1. In floating point 0.7 + 0.2 + 0.1 and 0.6 + 0.3 + 0.1 are 0.9999999999999999.
    for order in itertools.permutations(weights):
        spec = [{"name": "format", "pattern": "a", "weight": weight} for weight in order]
        assert judge(spec, "a").reward == 1.0, order


def test_a_term_that_only_punishes_makes_nothing_unparseable():
    spec = [{"name": "format", "pattern": "a"}, {"name": "last_number", "weight": -0.5}]
    assert judge(spec, "a", "1") == Score(1.0, figures={"format": 1.0, "last_number": 0.0})


def test_a_task_without_answers_refuses_a_verifier_that_needs_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(50)))
    for spec in ("math", {"name": "regex", "pattern": "a"}, [{"name": "length", "limit": 9}, {"name": "exact"}]):
        assert needs_answer(spec)
        with pytest.raises(TaskError, match="compares with an answer; got answer_field=None"):
            FileTask(tmp_path / "rows.jsonl", answer_field=None, verifier=spec)
    for spec in ({"name": "format", "pattern": "a"}, "m:f", [{"name": "length", "limit": 9}], "zebra", "json_schema"):
        assert not needs_answer(spec)


@pytest.mark.parametrize(("name", "package"), [("math", "math_verify"), ("json_schema", "jsonschema")])
def test_a_missing_extra_is_named_with_its_command(monkeypatch, name, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find(module))
    with pytest.raises(TaskError, match=rf"'{name}' needs the package .*; pip install 'sapo-rl\[tasks\]'"):
        load_verifier(name)
