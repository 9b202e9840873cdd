"""Layouts of other projects' files: which question and answer are found, what is ambiguous, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapo.errors import TaskError
from sapo.tasks import FileTask, make_task
from sapo.tasks.rows.layouts import LAYOUTS
from support.layouts import EIGHT, TOOL, write_lines

# The same sum in the eight layouts, as each project documents its rows; by hand.
SUMS = [(f"{i}+{i + 1}=", str(2 * i + 1)) for i in range(40)]


def rows_in(layout: str) -> list[dict[str, Any]]:
    return [EIGHT[layout](question, answer) for question, answer in SUMS]


def only_prompt(path: Path, **options: Any) -> Any:
    """Return the prompt of a file of one row."""
    return make_task("file", seed=0, path=str(path), **{"held_out_fraction": 1, **options}).held_out(1)[0]


@pytest.mark.parametrize("layout", EIGHT)
@pytest.mark.parametrize("wanted", [{}, {"layout": "auto"}, {"layout": None}, "by name"])
def test_a_file_of_each_project_is_read_as_it_is(tmp_path: Path, layout: str, wanted: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows_in(layout))
    options = {"layout": layout} if wanted == "by name" else wanted
    task = FileTask(path, verifier="last_number", held_out_fraction=1, **options)
    prompts = task.held_out(100)
    found = {(turn_of_the_user(prompt), prompt.answer) for prompt in prompts}
    assert found == {(question, answer) for question, answer in SUMS}
    assert len(task.notices) == 1
    assert f"rows.jsonl: layout {layout}, with the question in " in task.notices[0]
    for prompt in prompts:
        assert prompt.answer not in prompt.text.replace(turn_of_the_user(prompt), ""), "the answer is not in the prompt"
        assert all(turn["role"] != "assistant" for turn in prompt.metadata.get("messages", ()))


def turn_of_the_user(prompt: Any) -> str:
    """Return the question without what alpaca's instruction and a chat's roles put before it."""
    return prompt.text.splitlines()[-1].removeprefix("user: ")


def test_the_table_of_layouts_is_the_eight() -> None:
    assert set(LAYOUTS) == set(EIGHT)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        # TRL: prompt and completion, as texts and as conversations; a prompt of open-r1.
        ({"prompt": "2+2=", "completion": "4"}, "2+2=", "4"),
        (
            {
                "prompt": [{"role": "user", "content": "2+2="}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            "user: 2+2=",
            "4",
        ),
        ({"problem": "2+2=", "solution": "4"}, "2+2=", "4"),
        # swift: query and response with a system text and turns before.
        (
            {"query": "2+2=", "response": "4", "system": "Add.", "history": [["1+1=", "2"]]},
            "system: Add.\nuser: 1+1=\nassistant: 2\nuser: 2+2=",
            "4",
        ),
        # openai: rows of reinforcement fine-tuning end with the user's turn; contents may be parts.
        ({"messages": [{"role": "user", "content": "2+2="}], "reference_answer": "4"}, "user: 2+2=", "4"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2+2="}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
                ]
            },
            "user: 2+2=",
            "4",
        ),
        ({"prompt": "2+2=", "label": "4"}, "2+2=", "4"),
        ({"prompt": [{"role": "user", "content": "2+2="}], "info": {"answer": 4}}, "user: 2+2=", "4"),
        ({"instruction": "2+2=", "input": "", "output": "4", "system": "Add."}, "system: Add.\nuser: 2+2=", "4"),
        # sharegpt: the system text beside the turns, swift's pairs, turns of tools.
        (
            {
                "system": "Add.",
                "conversations": [{"from": "user", "value": "2+2="}, {"from": "chatgpt", "value": "4"}],
            },
            "system: Add.\nuser: 2+2=",
            "4",
        ),
        ({"conversation": [{"human": "2+2=", "assistant": "4"}]}, "user: 2+2=", "4"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2+2="},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "It is 4"},
                ]
            },
            "user: 2+2=\nassistant: \ntool: 4",
            "It is 4",
        ),
    ],
)
def test_the_variants_of_a_layout_are_found(tmp_path: Path, row: dict, question: str, answer: str) -> None:
    prompt = only_prompt(write_lines(tmp_path / "rows.jsonl", [row]))
    assert (prompt.text, prompt.answer) == (question, answer)


def test_a_call_of_a_tool_is_kept_as_the_template_takes_it(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    turns = [
        {"role": "user", "content": "2+2="},
        {"role": "tool_call", "content": json.dumps(call)},
        {"role": "tool_response", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    prompt = only_prompt(write_lines(tmp_path / "rows.jsonl", [{"messages": turns, "tools": json.dumps([TOOL])}]))
    assert prompt.metadata["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    assert prompt.metadata["messages"][2] == {"role": "tool", "content": "4"}
    assert prompt.metadata["tools"] == [TOOL]


def test_a_question_in_text_with_tools_is_a_chat(tmp_path: Path) -> None:
    """Plain text has no place for them."""
    prompt = only_prompt(write_lines(tmp_path / "rows.jsonl", [{"prompt": "2+2=", "solution": "4", "tools": [TOOL]}]))
    assert prompt.metadata["messages"] == [{"role": "user", "content": "2+2="}]
    assert prompt.metadata["tools"] == [TOOL]
    plain = only_prompt(write_lines(tmp_path / "rows.jsonl", [{"prompt": "2+2=", "solution": "4", "tools": []}]))
    assert "messages" not in plain.metadata


@pytest.mark.parametrize("tools", ["a hammer", [1], "{", '["hammer"]'])
def test_tools_that_are_none_are_refused_with_their_row(tmp_path: Path, tools: Any) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_lines(tmp_path / "rows.jsonl", [row, {**row, "tools": tools}])
    with pytest.raises(TaskError, match=r"rows\.jsonl:2: field 'tools' must be a list of objects"):
        FileTask(path)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        # Two conversations, two places of an answer, a question twice: nobody can tell which is meant.
        (
            {"messages": [{"role": "user", "content": "a"}], "conversations": [{"from": "human", "value": "b"}]},
            "openai or sharegpt",
        ),
        ({"prompt": "a", "answer": "1", "reward_model": {"ground_truth": "2"}}, "verl or plain"),
        ({"question": "a", "answer": "1", "input": "b", "label": "2"}, "openrlhf or verifiers"),
        ({"instruction": "a", "output": "1", "problem": "b", "solution": "2"}, "trl or alpaca"),
    ],
)
def test_an_ambiguous_file_is_refused_with_one_line(tmp_path: Path, row: dict, names: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    for options in ({}, {"layout": "auto"}):
        with pytest.raises(TaskError) as refusal:
            FileTask(path, **options)
        assert str(refusal.value).startswith(f"{path}:1: the row could be of the layouts {names}, which find different")
        assert "\n" not in str(refusal.value)
        assert "set layout=" in str(refusal.value)


def test_layouts_that_find_the_same_are_not_ambiguous(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": "1", "reward_model": {"ground_truth": "1"}}
    assert only_prompt(write_lines(tmp_path / "rows.jsonl", [row])).answer == "1"


def test_columns_that_could_both_be_the_answer_are_refused_unless_one_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"problem": "2+2=", "solution": "two and two are 4", "answer": "4"}])
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: .* solution and answer; set answer_field .* layout=trl"):
        only_prompt(path)
    assert only_prompt(path, layout="trl").answer == "two and two are 4"
    assert only_prompt(path, layout="trl", answer_field="answer").answer == "4"
    assert only_prompt(path, answer_field="answer", prompt_field="problem").answer == "4"


def test_prompt_and_answer_are_read_as_ever_whatever_stands_beside_them(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl", [{"prompt": "2+2=", "answer": "4", "solution": "2 and 2", "label": "x"}]
    )
    task = FileTask(path, held_out_fraction=1)
    prompt = task.held_out(1)[0]
    assert (prompt.text, prompt.answer, task.notices) == ("2+2=", "4", ())
    assert prompt.metadata == {"solution": "2 and 2", "label": "x"}


@pytest.fixture
def judged_by_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a file whose reward function needs no answer."""
    (tmp_path / "rewards_of_layouts.py").write_text(
        "def reward(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"verifier": "rewards_of_layouts:reward"}


def test_prompts_alone_are_read_where_no_answer_is_needed(tmp_path: Path, judged_by_a_function: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Write a poem.", "lines": 4}])
    prompt = only_prompt(path, **judged_by_a_function)
    assert (prompt.text, prompt.answer, prompt.metadata) == ("Write a poem.", None, {"lines": 4})
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: the row has no field 'answer'"):
        only_prompt(path, verifier="last_number")


def test_an_answer_that_is_an_object_is_for_reward_functions(
    tmp_path: Path, judged_by_a_function: dict[str, Any]
) -> None:
    truth = {"target": 24, "numbers": [1, 2, 3, 4]}
    path = write_lines(tmp_path / "rows.jsonl", [EIGHT["verl"]("?", truth)])  # type: ignore[arg-type]
    assert json.loads(only_prompt(path, **judged_by_a_function).answer) == truth
    with pytest.raises(
        TaskError, match=r"rows\.jsonl:1: field 'reward_model.ground_truth' must be a string or a finite"
    ):
        only_prompt(path, verifier="last_number")


def test_auto_says_that_it_found_no_other_layout(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "2+2=", "answer": "4"}])
    task = FileTask(path, layout="auto", held_out_fraction=1)
    assert task.notices == (f"{path}: no other layout, with the columns prompt and answer",)


def test_rows_that_look_like_another_layout_than_the_first_are_said(tmp_path: Path) -> None:
    plain = {"prompt": "2+2=", "answer": "4"}
    rows = [plain, {**plain, "prompt": "3+3="}, {"instruction": "Add.", "input": "1+1", "output": "2", **plain}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    task = FileTask(path, held_out_fraction=1)
    assert task.notices == ()  # which of the two it is cannot be told, and it has the columns that are read
    rows[2] = {"prompt": [{"role": "user", "content": "1+1="}], "reward_model": {"ground_truth": "2"}}
    path = write_lines(tmp_path / "mixed.jsonl", [EIGHT["verl"]("5+5=", "10"), *rows[:2]])
    with pytest.raises(TaskError, match=r"mixed\.jsonl:2: the row has no answer in the layout verl"):
        FileTask(path, held_out_fraction=1)
    task = FileTask(path, held_out_fraction=1, on_bad_row="skip")
    assert any(
        note.startswith(f"{path}:2: the row looks like the layout plain, and the first row like verl")
        for note in task.notices
    )
    same = write_lines(tmp_path / "same.jsonl", [EIGHT["verl"](f"{i}+5=", str(i + 5)) for i in range(3)])
    assert not any("looks like" in note for note in FileTask(same, held_out_fraction=1).notices)


def test_dotted_names_lead_into_objects(tmp_path: Path) -> None:
    row = {
        "q.text": "a column's own name goes first",
        "extra": {"question": "2+2="},
        "reward_model": {"ground_truth": 4},
        "info": '{"answer": "four"}',
    }
    path = write_lines(tmp_path / "rows.jsonl", [row])
    prompt = only_prompt(path, prompt_field="extra.question", answer_field="reward_model.ground_truth")
    assert (prompt.text, prompt.answer) == ("2+2=", "4")
    assert prompt.metadata["reward_model"] == {"ground_truth": 4}, "objects stay whole, for reward functions"
    assert only_prompt(path, prompt_field="q.text", answer_field="info.answer").answer == "four"
    assert only_prompt(path, prompt_field="q.text", answer_field="info.answer").text.startswith("a column's own")
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: the row has no field 'info.reply'"):
        only_prompt(path, prompt_field="q.text", answer_field="info.reply")
    dataset = make_task(
        "dataset",
        seed=0,
        path=str(path),
        prompt_field="extra.question",
        answer_field="info.answer",
        held_out_fraction=1,
    )
    assert dataset.held_out(1)[0].answer == "four"


def test_columns_stay_in_the_metadata_for_reward_functions(tmp_path: Path) -> None:
    row = EIGHT["verl"]("2+2=", "4")
    metadata = only_prompt(write_lines(tmp_path / "rows.jsonl", [row])).metadata
    assert metadata["data_source"] == row["data_source"]
    assert metadata["reward_model"] == row["reward_model"]
    assert metadata["extra_info"] == row["extra_info"]
    assert "prompt" not in metadata


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "the row has no question in the layout openai; it has ['messages']"),
        ({"messages": "2+2="}, "field 'messages' must be a list of messages; got '2+2='"),
        (
            {"messages": [{"role": "assistant", "content": "4"}]},
            "field 'messages' must ask before the assistant answers",
        ),
        ({"messages": [{"role": "user", "content": "2+2="}]}, "the row has no answer in the layout openai"),
        (
            {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": None}]},
            "the last turn of 'messages' is the answer and must be a text",
        ),
        ({"messages": [{"role": "user", "content": None}], "answer": "4"}, "must have a role and a content"),
    ],
)
def test_a_bad_row_of_a_layout_is_refused_with_its_place(tmp_path: Path, row: dict, words: str) -> None:
    good = EIGHT["openai"]("2+2=", "4")
    path = write_lines(tmp_path / "rows.jsonl", [good, row, good])
    with pytest.raises(TaskError) as refusal:
        FileTask(path)
    assert str(refusal.value).startswith(f"{path}:2: ")
    assert words in str(refusal.value)
    skipping = FileTask(path, on_bad_row="skip", held_out_fraction=1)
    assert [line for line in skipping.notices if "1 bad rows were skipped" in line]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "vrl"}, "layout must be one of auto, verl, trl, swift, .*; got 'vrl'; did you mean 'verl'"),
        (
            {"layout": "trl", "prompt_field": "problem"},
            "a layout finds the question itself; got layout=trl with prompt_f",
        ),
        ({"layout": "alpaca"}, "the row has no question in the layout alpaca; it has"),
    ],
)
def test_a_wrong_layout_is_refused(tmp_path: Path, options: dict, words: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows_in("trl"))
    with pytest.raises(TaskError, match=words):
        FileTask(path, **options)


def test_a_chat_that_ends_with_the_assistant_is_said_where_it_is_continued(tmp_path: Path) -> None:
    turns = EIGHT["openai"]("2+2=", "4")["messages"]
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns, "goal": "4"}])
    task = FileTask(path, prompt_field="messages", answer_field="goal", held_out_fraction=1)
    (notice,) = task.notices
    assert notice.startswith("rows: 1 chats end with the assistant's turn, which completions go on from; layout=openai")
