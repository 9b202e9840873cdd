"""What is found out about rows before a run: references nobody can read, copies, disagreements, wordings of chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapo.config import PromptConfig
from sapo.data import Prompt
from sapo.errors import ConfigError, TaskError
from sapo.rollout.prompting import PromptFormat
from sapo.tasks import FileTask, make_task
from support.layouts import write_lines

SOLUTION = (
    "First we add the two numbers, which gives a sum that is easy to find, and then " * 3 + "we see that it is 4."
)


@pytest.mark.parametrize(
    ("verifier", "bad", "words", "good"),
    [
        ("last_number", "four", "last_number needs a number as the answer; got 'four'; use another verifier", "4"),
        ("last_number", "", "last_number needs a number as the answer", "x = 3 #### 4"),
        ("boxed_integer", "3.5", "boxed_integer needs an integer as the answer; got '3.5'; use math", "070"),
        ("hash_answer", "x ####", "hash_answer needs an answer after the last '#'; got 'x ####'", "#### four"),
        ("math", " ", "verifier 'math' needs an answer; got ' '", "\\frac{1}{2}"),
        (
            "math",
            SOLUTION,
            "verifier 'math' needs an answer and not a whole solution; got 'First",
            SOLUTION + " #### 4",
        ),
        (
            "math",
            "\\frac{1}{2",
            "verifier 'math' needs LaTeX whose braces match; got '\\\\frac{1}{2'",
            "\\left\\{1, 2\\right\\}",
        ),
        ("math", "???", "verifier 'math' needs an answer; got '???'", "<"),
        ("math", "x=", "verifier 'math' needs an answer that is finished; got 'x='", "A+"),
        ("math", "(1,2", "verifier 'math' needs an answer whose brackets match; got '(1,2'", "[1,2)"),
        (
            "math",
            "We find that 3 is odd and so the sum is 4.",
            "verifier 'math' needs an answer and not a sentence; got 'We find",
            "It is impossible to say",
        ),
        ("choice", "1", "choice needs an answer that is an option or its letter; got '1'", "B"),
        ("choice_or_math", SOLUTION, "choice needs an answer that is an option", "A"),
        ({"name": "math", "thinking_end": None}, "{", "verifier 'math' needs", "7 hours and 30 minutes"),
        (
            [{"name": "format", "pattern": "x", "weight": 0.1}, {"name": "last_number"}],
            "four",
            "last_number needs",
            "4",
        ),
    ],
)
def test_a_reference_that_its_verifier_cannot_read_is_refused_with_its_row(
    tmp_path: Path, verifier: Any, bad: str, words: str, good: str
) -> None:
    options = {"options": ["x", "y"]}
    rows = [{"prompt": "p", "answer": good, **options}, {"prompt": "q", "answer": bad, **options}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for kind in ("file", "dataset"):
        with pytest.raises(TaskError) as refusal:
            make_task(kind, seed=0, path=str(path), verifier=verifier, held_out_fraction=1)
        assert str(refusal.value).startswith(f"{path}:2: {words}")
        assert "\n" not in str(refusal.value)
        task = make_task(kind, seed=0, path=str(path), verifier=verifier, held_out_fraction=1, on_bad_row="skip")
        assert (task.num_held_out, len(task.notices)) == (1, 1)
        assert task.notices[0].startswith(f"rows: 1 bad rows were skipped; the first: {path}:2: ")


@pytest.mark.parametrize(
    ("verifier", "column", "bad", "words"),
    [
        ("code", "tests", {"kind": "stdin", "cases": []}, "stdin tests need cases; got none"),
        ("code", "tests", None, "verifier 'code' needs tests in the prompt's metadata; got NoneType"),
        ("json_schema", "schema", "{", ""),
        ("zebra", "solution", {"rows": []}, "zebra needs metadata['solution'] = {header, rows}"),
    ],
)
def test_tests_and_schemas_are_tried_like_references(
    tmp_path: Path, verifier: str, column: str, bad: Any, words: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", column: bad}])
    with pytest.raises(TaskError) as refusal:
        FileTask(path, verifier=verifier, answer_field=None, held_out_fraction=1)
    assert str(refusal.value).startswith(f"{path}:1: {words}")


@pytest.mark.parametrize("verifier", ["choice", "choice_or_math"])
def test_options_that_are_no_list_are_refused_with_their_row(tmp_path: Path, verifier: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "A", "options": 4}])
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: a row's options must be a list; got 4; fix the row"):
        FileTask(path, verifier=verifier, held_out_fraction=1)


# ------------------------------------------------------------------------------------------- copies and disagreements


def test_prompts_that_differ_in_blanks_and_case_are_on_one_side(tmp_path: Path) -> None:
    questions = [f"What is {i} + {i}?" for i in range(60)]
    copies = [
        form(q) for q in questions for form in (str, str.upper, lambda q: f"  {q} ", lambda q: q.replace(" ", ""))
    ]
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": q, "answer": "x"} for q in copies])
    task = FileTask(path, held_out_fraction=0.5)
    likeness = [
        {p.likeness for p in side}
        for side in ([task.train_prompt(i) for i in range(task.num_train)], task.held_out(999))
    ]
    assert likeness[0].isdisjoint(likeness[1])
    assert len(likeness[0] | likeness[1]) == 60
    assert task.num_train + task.num_held_out == 240, "copies are rows of their own"
    assert min(map(len, likeness)) > 15, "30 of 60 on average"


def test_held_out_rows_that_are_near_copies_of_training_rows_are_said(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": f"What is {i}?", "answer": "x"} for i in range(5)])
    held_out = write_lines(
        tmp_path / "test.jsonl", [{"prompt": q, "answer": "x"} for q in ("what is 3 ?", "What is 7?")]
    )
    task = FileTask(train, held_out_path=held_out)
    assert task.notices == (
        "train: 1 held-out questions are training questions but for blanks and case; the first: 'what is 3 ?'",
    )


def test_a_question_with_different_answers_is_said_with_both_places(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "2"), ("a", " 1 "), ("a", "3"), ("b", "2")]
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": q, "answer": a} for q, a in rows])
    task = FileTask(path, held_out_fraction=1)
    assert task.notices == (
        f"rows: 1 rows answer a question otherwise than a row before; the first: {path}:1 has '1' and {path}:4 '3'",
    )


# -------------------------------------------------------------------------------------------------- wordings of chats


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c {x}"},
]


def test_a_template_words_the_last_of_the_users_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": CHAT, "answer": "x"}])
    task = make_task("dataset", seed=0, path=str(path), template="{prompt} Box it.", held_out_fraction=1)
    prompt = task.held_out(1)[0]
    assert prompt.text == "system: s\nuser: a\nassistant: b\nuser: c {x} Box it."
    form = PromptFormat.of(PromptConfig(template="Q: {prompt}"), task)
    assert [m["content"] for m in form.messages(prompt)] == ["s", "a", "b", "Q: c {x} Box it."]
    assert prompt.metadata["messages"][-1]["content"] == "c {x} Box it.", "the row is left as it is"


def test_a_template_is_refused_where_a_chat_has_no_message_of_the_user(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "system", "content": "s"}], "answer": "x"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        TaskError, match=r"rows\.jsonl:1: template words the user's message, and field 'prompt' has none"
    ):
        make_task("dataset", seed=0, path=str(path), template="{prompt} Box it.", held_out_fraction=1)
    prompt = Prompt(id=0, task="chat", text="system: s", metadata={"messages": rows[0]["prompt"]})
    with pytest.raises(
        ConfigError, match=r"prompt.template words the user's message, and a chat of task 'chat' has none"
    ):
        PromptFormat(template="Q: {prompt}").messages(prompt)


def test_an_integer_of_400_digits_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 10**399}]))
    with pytest.raises(TaskError, match=r"rows\.json:2: field 'answer' .* an integer of 400 digits; put it in quotes"):
        FileTask(path)
