"""How a recipe writes a verifier: names, options, weighted sums; and the smaller verifiers of form."""

import importlib.util
import itertools
import json
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


def judge(spec, text, answer=None, **metadata):
    return build_verifier(spec)(text, Prompt(id=0, task="t", text="?", answer=answer, metadata=metadata))


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


# ------------------------------------------------------------------------------------------------ patterns and schemas


@pytest.mark.parametrize(
    ("options", "text", "answer", "expected"),
    [
        ({"pattern": "<a>(.*?)</a>"}, "<a>4</a> no, <a> 5 </a>", "5", (1.0, "5")),
        ({"pattern": "<a>(.*?)</a>"}, "<a>5.0</a>", "5", (1.0, "5")),
        ({"pattern": "<a>(.*?)</a>"}, "<a>x\ny</a>", "x\ny", (1.0, "x\ny")),
        ({"pattern": "<a>(.*?)</a>"}, "<A>5</A>", "5", None),
        ({"pattern": "<a>(.*?)</a>", "ignore_case": True}, "<A>5</A>", "5", (1.0, "5")),
        ({"pattern": "[0-9]+"}, "4 and 5", "5", (1.0, "5")),
        ({"pattern": "(a)(b)", "group": 2}, "ab", "b", (1.0, "b")),
        ({"pattern": "(?P<x>a)(?P<y>b)", "group": "y"}, "ab", "b", (1.0, "b")),
        ({"pattern": "(a)(b)", "group": 0}, "ab", "ab", (1.0, "ab")),
        ({"pattern": "(a)(b)"}, "ab", "b", (0.0, "a")),
        ({"pattern": "(a)|(b)"}, "b", "b", None),
        ({"pattern": "so ([0-9]+)", "mode": "full"}, " so 5\n", "5", (1.0, "5")),
        ({"pattern": "so ([0-9]+)", "mode": "full"}, "so 5.", "5", None),
    ],
)
def test_regex_compares_what_a_group_captured(options, text, answer, expected):
    score = judge({"name": "regex", **options}, text, answer)
    if expected is None:
        assert (score.reward, score.status, score.answer) == (0.0, Status.UNPARSEABLE, None)
        assert score.detail
    else:
        assert (score.reward, score.answer, score.status) == (*expected, Status.SCORED)


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({"pattern": "<think>.*</think>"}, "a <think>\nx\n</think> b", 1.0),
        ({"pattern": "<think>.*</think>"}, "<think>", 0.0),
        ({"pattern": "<think>.*</think>.*", "mode": "full"}, " <think></think> 5 ", 1.0),
        ({"pattern": "<think>.*</think>", "mode": "full"}, "<think></think> 5", 0.0),
    ],
)
def test_format_rewards_the_presence_of_a_pattern(options, text, reward):
    assert judge({"name": "format", **options}, text) == Score(reward)


@pytest.mark.parametrize(
    ("limit", "margin", "length", "reward"),
    [
        (100, 40, 0, 0.0),
        (100, 40, 60, 0.0),
        (100, 40, 70, -0.25),
        (100, 40, 100, -1.0),
        (100, 40, 10_000, -1.0),
        (100, 0, 100, 0.0),
        (100, 0, 101, -1.0),
        (10, 10, 5, -0.5),
    ],
)
def test_length_punishes_in_a_straight_line_before_its_limit(limit, margin, length, reward):
    score = judge({"name": "length", "limit": limit, "margin": margin}, "x" * length)
    assert score == Score(reward)
    assert str(score.reward) == str(reward)  # no -0.0


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "reward", "answer"),
    [
        ('{"people": 3, "city": "Rome"}', 1.0, '{"city":"Rome","people":3}'),
        ('Well:\n```json\n{"city": "Rome"}\n```\nor {so}', 1.0, '{"city":"Rome"}'),
        ('{"city": 1} no, {"city": "Rome"}', 1.0, '{"city":"Rome"}'),
        ('{"city": 1}', 0.0, '{"city":1}'),
        ('{"people": 3}', 0.0, '{"people":3}'),
        ('{"city": "Rome", "x": 1}', 0.0, '{"city":"Rome","x":1}'),
    ],
)
def test_json_schema_judges_the_last_object(text, reward, answer):
    for score in (
        judge({"name": "json_schema", "schema": SCHEMA}, text),
        judge("json_schema", text, schema=SCHEMA),
        judge({"name": "json_schema", "schema_field": "s"}, text, s=json.dumps(SCHEMA)),
    ):
        assert (score.reward, score.answer, score.status) == (reward, answer, Status.SCORED)
        assert bool(score.detail) == (reward == 0)


@pytest.mark.parametrize("text", ["", "Rome", "[1]", '{"city": ', "{city: Rome}", "{" * 50_000, '{"a":' * 50_000])
def test_a_completion_without_a_json_object_is_unparseable(text):
    score = judge({"name": "json_schema", "schema": SCHEMA}, text)
    assert (score.reward, score.status) == (0.0, Status.UNPARSEABLE)


def test_a_schema_that_refers_elsewhere_fetches_nothing(monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("it went to the network"))
    with pytest.raises(Exception, match=r"Unresolvable|unresolvable"):
        judge({"name": "json_schema", "schema": {"$ref": "http://example.invalid/s.json"}}, '{"a": 1}')


def test_a_prompt_without_a_schema_cannot_be_judged():
    with pytest.raises(ValueError, match="json_schema needs a schema, an object; got None"):
        judge("json_schema", "{}")


# --------------------------------------------------------------------------------------------- boxes, choices, grids


@pytest.mark.parametrize(
    ("box", "reward", "answer"),
    [
        ("070", 1.0, "70"),
        ("70.0", 1.0, "70"),
        ("+70", 1.0, "70"),
        (r"\text{70}", 1.0, "70"),
        (r"N = 70", 1.0, "70"),
        (r"70^\circ", 1.0, "70"),
        (r"\frac{140}{2}", 1.0, "70"),
        ("71", 0.0, "71"),
        ("70.5", 0.0, "141/2"),
        ("-70", 0.0, "-70"),
    ],
)
def test_boxed_integer_reads_every_way_to_write_an_integer(box, reward, answer):
    score = judge("boxed_integer", rf"so \boxed{{{box}}}", "70")
    assert (score.reward, score.answer, score.status) == (reward, answer, Status.SCORED)


def test_an_integer_outside_the_contests_range_is_wrong_and_no_vote():
    contest = {"name": "boxed_integer", "minimum": 0, "maximum": 999}
    assert judge(contest, r"\boxed{1000}", "70") == Score(0.0)
    assert judge(contest, r"\boxed{-1}", "70") == Score(0.0)
    assert judge(contest, r"\boxed{999}", "999") == Score(1.0, answer="999")


@pytest.mark.parametrize("box", ["", "seventy", "x", r"\sqrt{70}", "70, 71", "70\\%", "7" * 500, "__import__('os')"])
def test_a_box_without_an_integer_is_unparseable(box):
    score = judge("boxed_integer", rf"\boxed{{{box}}}", "70")
    assert (score.reward, score.status, score.answer) == (0.0, Status.UNPARSEABLE, None)


@pytest.mark.parametrize("answer", ["x", "1/2", ""])
def test_boxed_integer_refuses_an_answer_that_is_no_integer(answer):
    with pytest.raises(ValueError, match="boxed_integer needs an integer as the answer"):
        judge("boxed_integer", r"\boxed{1}", answer)


VALUES = ["red", "$\\frac{1}{2}$", "1,000", "red wine", "None of these."]


@pytest.mark.parametrize(
    ("text", "answer", "given"),
    [
        (r"\boxed{B}", "B", "B"),
        (r"\boxed{b}", "B", "B"),
        (r"\boxed{\frac12}", "B", "B"),
        (r"\boxed{0.5}", "B", "B"),
        (r"\boxed{1000}", "C", "C"),
        (r"\boxed{\text{Red}}", "A", "A"),
        (r"\boxed{(A) red}", "A", "A"),
        (r"\boxed{(A) red wine}", "D", None),  # one option's letter, another's value
        (r"\boxed{none of these}", "E", "E"),
        ("Well,\nthe answer is (C).", "C", "C"),
        ("So the answer is red wine.", "D", "D"),
        ("D", "D", "D"),
        ("D. red wine", "D", "D"),
        ("I choose red wine", "D", "D"),
        ("I like red wine", "D", None),
        ("A cat sat there", "A", None),
        (r"\boxed{F}", "A", None),
        (r"\boxed{green}", "A", None),
        ("", "A", None),
    ],
)
def test_choice_reads_letters_and_values(text, answer, given):
    for reference in (answer, VALUES["ABCDE".index(answer)]):  # the answer may be written as the value too
        score = judge("choice", text, reference, options=VALUES)
        assert score.answer == given
        assert score.reward == float(given == answer)
        assert score.status is (Status.UNPARSEABLE if given is None else Status.SCORED)


def test_choice_without_options_compares_letters_numbers_or_words():
    assert judge("choice", r"\boxed{(C)}", "C", options=[]).reward == 1.0
    assert judge("choice", r"\boxed{6.0}", "6", options=[]) == Score(1.0, answer="6")
    assert judge("choice", r"\boxed{7}", "6").reward == 0.0
    assert judge("choice", "the answer is Dark Blue.", "dark blue").reward == 1.0
    assert judge("choice", "hm", "6").status is Status.UNPARSEABLE


def test_choice_refuses_an_answer_that_is_no_option():
    with pytest.raises(ValueError, match="choice needs an answer that is an option or its letter; got 'F'"):
        judge("choice", r"\boxed{A}", "F", options=VALUES)


GRID = {"header": ["House", "Name", "Pet"], "rows": [["1", "Bob", "cat"], ["2", "Eve", "dog"]]}


@pytest.mark.parametrize(
    ("solution", "share"),
    [
        ({"House 1": {"Name": "Bob", "Pet": "cat"}, "House 2": {"Name": "Eve", "Pet": "dog"}}, 1.0),
        ({"house 1": {"name": " BOB", "pet": ["cat"]}, "House 2": {"Name": "Eve", "Pet": "dog"}, "House 3": {}}, 1.0),
        ({"House 1": {"Name": "Bob", "Pet": "dog"}, "House 2": {"Name": "Eve", "Pet": "cat"}}, 0.5),
        ({"House 1": {"Name": "Bob"}}, 0.25),
        ({"House 1": None, "House 2": [1], "House 3": "x"}, 0.0),
        ({"House 1": {"Name": None, "Pet": {"a": 1}}, "House 2": {"Name": [], "Pet": True}}, 0.0),
        ({"House 1": {"Name": [["Bob"]], "Pet": 3}, "House 2": {"Name": 1e400, "Pet": "dog"}}, 0.25),
        ({}, 0.0),
    ],
)
def test_zebra_counts_cells_and_never_stumbles_over_types(solution, share):
    score = judge("zebra", json.dumps({"reasoning": None, "solution": solution}), solution=GRID)
    assert (score.reward, score.status) == (float(share == 1), Status.SCORED)
    assert score.figures == {"cell_accuracy": share}


@pytest.mark.parametrize(
    "text", ["", "House 1 is Bob's", '{"solution": []}', '{"answer": {}}', '{"solution": "x"}', "[{}]"]
)
def test_a_grid_that_is_not_there_is_unparseable(text):
    score = judge("zebra", text, solution=GRID)
    assert (score.reward, score.status, score.figures) == (0.0, Status.UNPARSEABLE, {})


@pytest.mark.parametrize("solution", [None, {}, {"header": ["House"], "rows": [["1"]]}, {"header": 3, "rows": 4}, "x"])
def test_zebra_refuses_a_reference_that_is_no_grid(solution):
    with pytest.raises(ValueError, match="zebra needs"):
        judge("zebra", "{}", solution=solution)
