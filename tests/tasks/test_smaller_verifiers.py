"""The smaller verifiers: patterns, lengths, schemas, boxes, choices and grids."""

import json

import pytest

from sapo.data import Score, Status
from support.answers import judge


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
