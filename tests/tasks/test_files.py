"""Tasks from files: rows in, prompts out, and a message with file and row for every way a file can be wrong."""

import json
import os
import re
import subprocess
import sys
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from sapo.data import Score
from sapo.errors import TaskError
from sapo.tasks import FileTask, Task, WorkedTask

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, "level": i % 3} for i in range(60)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", ROWS)


def epoch(task, number=0):
    return [task.train_prompt(number * task.num_train + i) for i in range(task.num_train)]


# ------------------------------------------------------------------------------------------------------------ rows


def test_parquet_and_jsonl_give_the_same_prompts(data, tmp_path):
    one, other = FileTask(data), FileTask(write_parquet(tmp_path / "data.parquet", ROWS))
    assert epoch(one) == epoch(other)
    assert one.held_out(100) == other.held_out(100)
    assert one.num_train + one.num_held_out == 60


def test_parquet_and_jsonl_give_the_same_chat_prompts(tmp_path):
    rows = [
        {"chat": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}?"}], "answer": "yes"}
        for i in range(40)
    ]
    one = FileTask(write_jsonl(tmp_path / "a.jsonl", rows), prompt_field="chat", name="chat")
    other = FileTask(write_parquet(tmp_path / "a.parquet", rows), prompt_field="chat", name="chat")
    assert epoch(one) == epoch(other)
    prompt = one.train_prompt(0)
    number = prompt.metadata["messages"][1]["content"]
    assert prompt.metadata["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": number},
    ]
    assert prompt.text == f"system: Be brief.\nuser: {number}"


def test_a_row_becomes_text_answer_and_metadata(data):
    task = FileTask(data)
    prompt = task.train_prompt(7)
    i = int(re.search(r"\d+", prompt.text).group())
    assert (prompt.id, prompt.task, prompt.text) == (7, "data", f"What is {i} + {i}?")
    assert (prompt.answer, dict(prompt.metadata)) == (str(2 * i), {"level": i % 3})
    assert prompt.token_ids == ()


@pytest.mark.parametrize(("answer", "text"), [("yes", "yes"), ("", ""), (3, "3"), (-2.5, "-2.5"), (2**70, str(2**70))])
def test_answers_are_strings_or_numbers_written_as_text(tmp_path, answer, text):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "answer": answer} for i in range(40)])
    assert FileTask(path).train_prompt(0).answer == text


def test_a_decimal_of_parquet_is_a_number(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": f"p{i}", "answer": Decimal("1.50")} for i in range(40)])
    assert FileTask(path).train_prompt(0).answer == "1.50"


def test_blank_lines_and_a_byte_order_mark_are_allowed_and_lines_are_still_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ["\ufeff" + json.dumps(ROWS[0]), "", "  ", *(json.dumps(row) for row in ROWS[1:])]
    path.write_bytes("\r\n".join(lines).encode("utf-8"))
    task = FileTask(path)
    assert task.num_train + task.num_held_out == 60
    path.write_bytes("\n".join([*lines[:3], "oops"]).encode("utf-8"))
    with pytest.raises(TaskError, match=r"a\.jsonl:4: "):
        FileTask(path)


def test_other_fields_may_be_named(tmp_path):
    rows = [{"question": f"q{i}", "solution": "a #### 18"} for i in range(40)]
    path = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    task = FileTask(path, prompt_field="question", answer_field="solution", verifier="hash_answer", name="gsm")
    prompt = task.train_prompt(0)
    assert task.name == prompt.task == "gsm"
    assert task.verify("6 * 3 #### 18", prompt) == Score(1.0, answer="18")


def test_a_file_task_is_a_task_without_worked_examples(data):
    assert isinstance(FileTask(data), Task)
    assert not isinstance(FileTask(data), WorkedTask)


# ----------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("number", [0, 1, 10**15])
def test_every_row_comes_once_in_an_epoch(data, number):
    task = FileTask(data)
    texts = [prompt.text for prompt in epoch(task, number)]
    held_out = [prompt.text for prompt in task.held_out(100)]
    assert sorted(texts + held_out) == sorted(row["prompt"] for row in ROWS)


def test_epochs_and_seeds_have_different_orders(data):
    task = FileTask(data, seed=1)
    orders = [
        [p.text for p in epoch(task, 0)],
        [p.text for p in epoch(task, 1)],
        [p.text for p in epoch(FileTask(data))],
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_a_prompt_depends_on_its_index_alone(data):
    task, indices = FileTask(data), [500, 3, 61, 0, 499, 3]
    assert [task.train_prompt(i) for i in indices] == [FileTask(data).train_prompt(i) for i in indices]


def test_prompts_are_the_same_in_another_process_with_another_hash_seed(data):
    code = (
        "import sys; from sapo.tasks import FileTask\n"
        "t = FileTask(sys.argv[1])\n"
        "print(*[t.train_prompt(i).text for i in range(100)], *[p.text for p in t.held_out(9)], sep='|')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code, str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    task = FileTask(data)
    here = [task.train_prompt(i).text for i in range(100)] + [p.text for p in task.held_out(9)]
    assert done.stdout.strip() == "|".join(here)


# ------------------------------------------------------------------------------------------------------- the split


def test_copies_of_a_prompt_are_on_one_side_and_held_out_once(tmp_path):
    task = FileTask(write_jsonl(tmp_path / "a.jsonl", ROWS * 3), held_out_fraction=0.3)
    train = [prompt.text for prompt in epoch(task)]
    held_out = [prompt.text for prompt in task.held_out(1000)]
    assert len(train) == 3 * len(set(train))
    assert len(held_out) == len(set(held_out)) == task.num_held_out
    assert not set(train) & set(held_out)
    assert len(set(train)) + len(held_out) == 60


def test_of_held_out_copies_the_first_row_stays(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    copies = [{"prompt": "p", "answer": "first"}, {"prompt": "p", "answer": "second"}]
    task = FileTask(train, held_out_path=write_jsonl(tmp_path / "test.jsonl", copies))
    assert [prompt.answer for prompt in task.held_out(5)] == ["first"]


def test_the_split_depends_neither_on_the_seed_nor_on_the_order_of_rows(data, tmp_path):
    turned = write_jsonl(tmp_path / "turned.jsonl", ROWS[::-1])
    sides = [
        {p.text for p in task.held_out(100)} for task in (FileTask(data), FileTask(data, seed=9), FileTask(turned))
    ]
    assert sides[0] == sides[1] == sides[2]


def test_held_out_rows_may_come_from_their_own_file(data, tmp_path):
    other = write_parquet(tmp_path / "test.parquet", [{"prompt": f"p{i}", "answer": i} for i in range(5)])
    task = FileTask(data, held_out_path=other)
    assert (task.num_train, task.num_held_out) == (60, 5)
    assert sorted(p.text for p in task.held_out(9)) == [f"p{i}" for i in range(5)]
    assert task.held_out(2) == task.held_out(9)[:2]
    assert [p.id for p in task.held_out(9)] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------- errors


GOOD = json.dumps({"prompt": "p", "answer": "a"}).encode()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"prompt": "p", "answer": }', ["one JSON object", "Expecting value at column 27"]),
        (b"[1, 2]", ["one JSON object", "got [1, 2]"]),
        (b"null", ["one JSON object", "got None"]),
        (b'{"prompt": "\xff", "answer": ""}', ["utf-8", "invalid start byte"]),
        (b"[" * 100_000, ["one JSON object"]),
        (b'{"prompt": "p", "answer": ' + b"9" * 10_000 + b"}", ["one JSON object"]),
        (
            b'{"question": "p", "solution": "a"}',
            ["the row has no field 'prompt'; it has ['question', 'solution']; set prompt_field or add it"],
        ),
        (
            b'{"prompt": "p", "Answers": "a"}',
            [
                "no field 'answer'; it has ['prompt', 'Answers']; "
                "set answer_field (null for rows without an answer) or add it; did you mean 'Answers'?"
            ],
        ),
        (b'{"prompt": "", "answer": "a"}', ["field 'prompt'", "non-empty", "got ''"]),
        (b'{"prompt": " ", "answer": "a"}', ["field 'prompt'", "non-empty", "got ' '"]),
        (b'{"prompt": 3, "answer": "a"}', ["field 'prompt'", "got 3"]),
        (b'{"prompt": [], "answer": "a"}', ["field 'prompt'", "got []"]),
        (b'{"prompt": ["p"], "answer": "a"}', ["role and a content", "got 'p'"]),
        (b'{"prompt": [{"role": "user"}], "answer": "a"}', ["role and a content", "got {'role': 'user'}"]),
        (b'{"prompt": "p", "answer": null}', ["field 'answer'", "string or a finite number", "got None"]),
        (b'{"prompt": "p", "answer": true}', ["field 'answer'", "got True"]),
        (b'{"prompt": "p", "answer": NaN}', ["field 'answer'", "got nan"]),
        (b'{"prompt": "p", "answer": ["a"]}', ["field 'answer'", "got ['a']"]),
        (
            b'{"prompt": "p", "answer": ' + b"9" * 400 + b"}",
            ["field 'answer'", "an integer of 400 digits; put it in quotes"],
        ),
        (b'{"prompt": "p", "answer": -1' + b"0" * 399 + b"}", ["field 'answer'", "an integer of 400 digits"]),
        (b'{"prompt": "p", "answer": "a", "messages": []}', ["'messages' must be the prompt", "prompt_field=messages"]),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_line(tmp_path, line, parts):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(TaskError) as caught:
        FileTask(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    for part in parts:
        assert part in message


def test_a_missing_column_of_parquet_is_refused_with_the_columns_there_are(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [{"prompt": "p", "solutions": "a"}] * 3)
    with pytest.raises(
        TaskError, match=r"no field 'answer'; it has \['prompt', 'solutions'\]; set answer_field"
    ) as caught:
        FileTask(path)
    assert str(path) in str(caught.value)


def test_a_bad_row_of_parquet_is_refused_with_its_number(tmp_path):
    rows = [{"prompt": "p", "answer": "a"}, {"prompt": "p", "answer": None}]
    with pytest.raises(TaskError, match=r"data\.parquet:2: field 'answer'"):
        FileTask(write_parquet(tmp_path / "data.parquet", rows))


@pytest.mark.parametrize(
    ("name", "contents", "parts"),
    [
        ("missing.jsonl", None, ["there must be a file", "check the path"]),
        ("missing.parquet", None, ["there must be a file"]),
        ("data.jsn", b"{}", ["must end in .jsonl, .json, .csv or .parquet", "'.jsn'", "did you mean '.json"]),
        ("data.tsv", b"", ["must end in .jsonl, .json, .csv or .parquet", "'.tsv'"]),
        ("data.jsonl.gz", b"{}", ["must be compressed by gzip"]),
        ("data", b"", ["must end in .jsonl, .json, .csv or .parquet", "''"]),
        ("data.json", b"{}", ["one list of objects", "got {}"]),
        ("data.json", b'{"a": 1}\n{"a": 2}', ["one list of objects", "Extra data", "one object per line is .jsonl"]),
        ("data.json", b"[]", ["at least one row"]),
        ("data.jsonl", b"", ["at least one row", "got none"]),
        ("data.jsonl", b"\n \n", ["at least one row"]),
        ("data.parquet", b"PAR1 but not really", ["must be Parquet"]),
        ("data.parquet", b"", ["must be Parquet"]),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, contents, parts):
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(TaskError) as caught:
        FileTask(path)
    assert str(caught.value).startswith(f"{path}: ")
    for part in parts:
        assert part in str(caught.value)


def test_an_empty_parquet_file_is_refused(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(TaskError, match="at least one row"):
        FileTask(path)


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "data.jsonl").mkdir()
    with pytest.raises(TaskError, match="there must be a file"):
        FileTask(tmp_path / "data.jsonl")


def test_an_error_in_the_held_out_file_names_that_file(data, tmp_path):
    with pytest.raises(TaskError, match=r"test\.jsonl: there must be a file"):
        FileTask(data, held_out_path=tmp_path / "test.jsonl")


def test_a_held_out_file_that_shares_prompts_with_the_training_file_is_refused(data, tmp_path):
    other = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "new", "answer": 1}, ROWS[3], ROWS[4]])
    with pytest.raises(TaskError, match=r"test\.jsonl: no held-out prompt .* got 2 shared, one is 'What is 3 \+ 3\?'"):
        FileTask(data, held_out_path=other)


def test_a_split_with_an_empty_side_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS[:1] * 5)
    with pytest.raises(TaskError, match=r"both sides of the split .* got 5 training and 0 held-out"):
        FileTask(path)
    with pytest.raises(TaskError, match="got 0 training and 5 held-out"):
        FileTask(path, held_out_fraction=0.999999)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"held_out_fraction": 0}, ["between 0 and 1", "got 0"]),
        ({"held_out_fraction": 1.5}, ["between 0 and 1", "got 1.5"]),
        ({"held_out_fraction": "0.1"}, ["between 0 and 1", "got '0.1'"]),
        ({"held_out_fraction": 0.1, "held_out_path": "x.jsonl"}, ["not both", "leave one out"]),
        ({"verifier": "exakt"}, ["did you mean 'exact'"]),
        ({"answer_field": "prompt"}, ["must differ", "'prompt' for both"]),
        ({"answer_field": None}, ["'exact' compares with an answer", "name the field"]),
    ],
)
def test_a_wrong_option_is_refused(data, options, parts):
    with pytest.raises(TaskError) as caught:
        FileTask(data, **options)
    for part in parts:
        assert part in str(caught.value)


def test_a_negative_index_is_refused(data):
    with pytest.raises(TaskError, match="0 or more; got -1"):
        FileTask(data).train_prompt(-1)
