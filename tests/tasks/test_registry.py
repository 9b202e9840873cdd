"""Tasks by name."""

import pytest

from sapo.errors import TaskError
from sapo.tasks import TASKS, ArithmeticTask, FileTask, make_task


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "answer": {i}}}\n' for i in range(60)))
    return path


def test_an_arithmetic_task_is_made_with_its_options_and_seed():
    task = make_task("arithmetic", seed=5, operation="multiply", digits=2, name="times")
    assert isinstance(task, ArithmeticTask)
    assert (task.seed, task.operation, task.digits, task.name) == (5, "multiply", 2, "times")
    assert task.train_prompt(0).task == "times"


@pytest.mark.parametrize("kind", ["file", "jsonl", "parquet"])
def test_a_file_task_has_three_names(kind, data):
    task = make_task(kind, seed=5, path=data)
    assert isinstance(task, FileTask)
    assert task.train_prompt(3) == FileTask(data, seed=5).train_prompt(3)


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("arithmatic", {}, ["must be one of", *TASKS, "got 'arithmatic'", "did you mean 'arithmetic'"]),
        ("arithmetic", {"digit": 3}, ["got 'digit'", "did you mean 'digits'", "held_out_fraction"]),
        ("file", {"path": "x.jsonl", "answer_feild": "a"}, ["got 'answer_feild'", "did you mean 'answer_field'"]),
        ("file", {}, ["needs the option 'path'", "add path="]),
        ("arithmetic", {"digits": -1}, ["digits must be", "got -1"]),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_the_nearest_known(kind, options, parts):
    with pytest.raises(TaskError) as caught:
        make_task(kind, seed=0, **options)
    for part in parts:
        assert part in str(caught.value)
