"""Tasks by name."""

import pytest

from sapo.errors import TaskError
from sapo.tasks import TASKS, ArithmeticTask, FileTask, make_task
from sapo.tasks.registry import keep_task


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


def test_task_objects_of_one_name_are_told_apart_by_rows_and_by_judgement(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file, shift in zip(files, (0, 1), strict=True):
        file.write_text("".join(f'{{"prompt": "p{i}", "answer": {i + shift}}}\n' for i in range(60)))

    class Kind(ArithmeticTask):
        def verify(self, text, prompt):
            return super().verify(text.strip("!"), prompt)

    first, second = (FileTask(file, name="mine") for file in files)
    strict, kind = ArithmeticTask(name="mine"), Kind(name="mine")
    names = [keep_task(task) for task in (first, second, strict, kind)]
    assert len(set(names)) == 4
    assert [make_task(name, seed=0) for name in names] == [first, second, strict, kind]
    # The same one made again, as in another session, has the name that the run wrote down.
    assert keep_task(FileTask(files[0], name="mine")) == names[0]
    with pytest.raises(TaskError, match="got a process where it is another; go on from Python with the same one"):
        make_task("in_process:mine@0123456789abcdef", seed=0)
    with pytest.raises(TaskError, match="got a process without it"):
        make_task("in_process:yours@0123456789abcdef", seed=0)


def test_a_task_with_tools_that_lacks_methods_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tasks_of_a_test.py").write_text(
        "from sapo.environments.tool_task import ToolTask\n"
        "class Half(ToolTask):\n    name = 'half'\n    def train_prompt(self, index): ...\n"
    )
    with pytest.raises(TaskError, match="must have the methods held_out, verify; write them in its class"):
        make_task("tasks_of_a_test:Half", seed=0)
