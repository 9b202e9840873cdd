"""The dataset task: rows of a hub repository, a directory or a file, with columns as the recipe names them."""

import ast
import dataclasses
import hashlib
import inspect
import json
import textwrap

import pytest

from sapo.errors import TaskError
from sapo.tasks import TASKS, DatasetSettings, DatasetTask, FileSettings, FileTask, Task, make_task

datasets = pytest.importorskip("datasets")

ROWS = [{"question": f"What is {i} + {i}?", "solution": f"{i} + {i} = {2 * i} #### {2 * i}"} for i in range(60)]
COLUMNS = {"prompt_field": "question", "answer_field": "solution"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What the library writes while it reads a directory stays in the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def everything(task):
    return [task.train_prompt(i) for i in range(task.num_train)] + task.held_out(task.num_held_out)


def message(**options):
    with pytest.raises(TaskError) as caught:
        make_task("dataset", seed=0, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------------- sources


def test_a_file_a_list_in_json_a_directory_and_a_saved_dataset_give_the_same_prompts(tmp_path):
    jsonl = write_jsonl(tmp_path / "plain" / "train.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    expected = everything(FileTask(jsonl, **COLUMNS, name="sums"))
    assert len(expected) == 60
    for path in (jsonl, *map(tmp_path.joinpath, ("rows.json", "rows.parquet", "plain", "one", "saved"))):
        assert everything(DatasetTask(path=path, **COLUMNS, name="sums")) == expected, path
        assert everything(DatasetTask(str(path), **COLUMNS, name="sums")) == expected, path


def test_splits_of_a_directory_are_the_two_sides(tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS[:50])
    write_jsonl(tmp_path / "data" / "test.jsonl", ROWS[50:])
    task = DatasetTask(path=tmp_path / "data", **COLUMNS, held_out_split="test")
    assert (task.name, task.num_train, task.num_held_out) == ("data", 50, 10)
    assert sorted(prompt.text for prompt in task.held_out(99)) == sorted(row["question"] for row in ROWS[50:])
    with pytest.raises(TaskError, match=r"test\.jsonl: no held-out prompt may be in .*\[test\]; got 10 shared"):
        DatasetTask(path=tmp_path / "data", **COLUMNS, split="test", held_out_path=tmp_path / "data" / "test.jsonl")


def test_a_hub_repository_is_asked_for_by_id_configuration_revision_and_split(monkeypatch):
    asked = []

    def load(path, **arguments):
        asked.append((path, arguments))
        return datasets.Dataset.from_list(ROWS[:20] if arguments["split"] == "train" else ROWS[20:])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("sapo.tasks.rows.hub._hub_answers", lambda library: True)
    options = {"config": "main", "revision": "abc", "split": "train", "held_out_split": "test"}
    task = DatasetTask("someone/sums", **COLUMNS, **options, answer_after="####")
    assert (task.name, task.num_train, task.num_held_out) == ("sums", 20, 40)
    assert asked == [
        ("someone/sums", {"name": "main", "revision": "abc", "split": split}) for split in ("train", "test")
    ]
    asked.clear()
    DatasetTask("someone/sums", **COLUMNS, data_files=["a.jsonl", "b.jsonl"])
    urls = [f"hf://datasets/someone/sums@main/{name}.jsonl" for name in "ab"]
    assert asked == [("json", {"data_files": {"train": urls}, "split": "train"})]


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_way_out(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = datasets.config.HF_HUB_OFFLINE
    text = message(dataset="nobody/nothing")
    assert text.startswith("nobody/nothing: the Hugging Face hub cannot be reached and the dataset is not in the cache")
    assert "path=" in text
    assert datasets.config.HF_HUB_OFFLINE is before


def test_a_hub_that_does_not_answer_is_asked_once_and_not_waited_for(monkeypatch):
    import huggingface_hub

    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert "cannot be reached" in message(dataset="nobody/nothing")
    assert asked == [(huggingface_hub.constants.ENDPOINT, 5.0)]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_the_hub_says_of_an_unknown_id_is_one_line(monkeypatch):
    def load(path, **arguments):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist\non the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("sapo.tasks.rows.hub._hub_answers", lambda library: True)
    text = message(dataset="nobody/nothing")
    assert text == (
        "nobody/nothing[train]: loading failed: Dataset 'nobody/nothing' doesn't exist on the Hub.; check the id, "
        "config, split and revision"
    )


def test_a_missing_library_is_named_with_the_command_that_adds_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "data").mkdir()
    for options in ({"path": tmp_path / "data"}, {"dataset": "someone/sums"}):
        assert "pip install 'sapo-rl[tasks]'" in message(**options)
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert DatasetTask(path=path, **COLUMNS).num_train == FileTask(path, **COLUMNS).num_train  # a file needs none


# ---------------------------------------------------------------------------------------------------------- columns


def test_template_subject_answer_mark_and_dropped_columns_make_the_prompt(tmp_path):
    rows = [{**row, "kind": ["sum", "even"], "id": 7, "big": "x" * 99} for row in ROWS]
    path = write_jsonl(tmp_path / "sums.jsonl", rows)
    task = DatasetTask(
        path=path,
        **COLUMNS,
        answer_after="####",
        subject_field=["subject", "kind"],
        drop_fields="big",
        template="{prompt}\nPut it within \\boxed{}.",
        held_out_fraction=1,
        prefers_chat=True,
    )
    prompts = {prompt.text: prompt for prompt in task.held_out(99)}
    prompt = prompts["What is 7 + 7?\nPut it within \\boxed{}."]
    assert prompt.answer == "14"
    metadata = {"solution": "7 + 7 = 14 #### 14", "kind": ["sum", "even"], "id": 7, "subject": "sum, even"}
    assert prompt.metadata == metadata
    assert isinstance(task, Task)
    assert task.prefers_chat


def test_the_first_alternative_that_a_row_has_is_its_column(tmp_path):
    rows = [{"Problem": "a", "Answer": 1}, {"problem": "b", "Problem": "c", "answer": 2, "Answer": 3}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    fields = {"prompt_field": ["problem", "Problem"], "answer_field": ["Answer", "answer"]}
    task = DatasetTask(path=path, **fields, held_out_fraction=1)
    assert {prompt.text: prompt.answer for prompt in task.held_out(9)} == {"a": "1", "b": "3"}


def test_a_question_with_braces_is_put_into_the_template_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "{answer} {} {prompt}", "answer": "x"}])
    task = DatasetTask(path=path, template="Q: {prompt} \\boxed{}", held_out_fraction=1)
    assert task.held_out(1)[0].text == "Q: {answer} {} {prompt} \\boxed{}"


def test_chat_content_in_text_parts_is_joined(tmp_path):
    content = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": content}], "answer": 2}])
    prompt = DatasetTask(path=path, held_out_fraction=1).held_out(1)[0]
    assert prompt.metadata["messages"] == [{"role": "user", "content": "What is 1 + 1?"}]


# ------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_a_benchmark_holds_every_row_out_and_refuses_to_train(tmp_path, kind):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    task = make_task(kind, seed=0, path=path, **COLUMNS, held_out_fraction=1)
    assert (task.num_train, task.num_held_out) == (0, 60)
    assert {prompt.text for prompt in task.held_out(99)} == {row["question"] for row in ROWS}
    for ask in (lambda: task.train_prompt(0), lambda: task.shots(1)):
        with pytest.raises(TaskError, match=r"all 60 rows are held out for evaluation .* set held_out_fraction"):
            ask()


def test_examples_are_distinct_training_questions_with_their_solutions_whatever_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS + ROWS)
    task = DatasetTask(path=path, **COLUMNS, answer_after="####", template="Q: {prompt}", held_out_fraction=0.3)
    shots = task.shots(4)
    solutions = {f"Q: {row['question']}": row["solution"] for row in ROWS}
    assert len(dict(shots)) == 4
    assert all(solutions[question] == answer for question, answer in shots)
    assert not {question for question, _ in shots} & {prompt.text for prompt in task.held_out(99)}
    other = DatasetTask(
        path=path, **COLUMNS, answer_after="####", template="Q: {prompt}", held_out_fraction=0.3, seed=5
    )
    assert other.shots(4) == shots
    with pytest.raises(TaskError, match="distinct training rows; got shots=61"):
        task.shots(61)


# ----------------------------------------------------------------------------------------------------------- errors


def test_pictures_of_the_library_are_shown_as_they_are_encoded(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict({"prompt": ["p"], "answer": ["a"], "picture": [str(tmp_path / "a.png")]})
    rows = rows.cast_column("picture", datasets.Image())
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    listed = rows.map(
        lambda row: {"picture": [row["picture"]]},
        features=datasets.Features(
            {"prompt": datasets.Value("string"), "answer": datasets.Value("string"), "picture": [datasets.Image()]}
        ),
    )
    listed.save_to_disk(tmp_path / "listed")
    write_jsonl(tmp_path / "paths.jsonl", [{"prompt": "p", "answer": "a", "image": "a.png"}])
    columns = {"saved": "picture", "rows.parquet": "picture", "listed": "picture", "paths.jsonl": "image"}
    encoded = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    for name, column in columns.items():
        named = {"path": tmp_path / name, "held_out_fraction": 1, "allow_paths": True}
        (shown,) = DatasetTask(**named, image_field=column).held_out(1)[0].pictures
        assert (shown.sha256, shown.size) == (encoded, (8, 8)), name
        if column == "picture":
            assert f"the field that image_field names; got some in {column}; set image_field={column}" in message(
                **named
            )
        text = DatasetTask(**named, drop_fields=[column]).held_out(1)[0]
        assert (text.pictures, text.metadata) == ((), {})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["a dataset task needs dataset", "or path", "got neither"]),
        ({"path": "nothing"}, ["nothing: there must be a file or a directory"]),
        ({"dataset": "./nothing.jsonl"}, ["nothing.jsonl: there must be a file"]),
        ({"path": "sums.jsonl", "held_out_split": "test"}, ["a file has no splits", "set held_out_path"]),
        ({"path": "data", "split": "trian"}, ['Unknown split "trian"', "['train']"]),
        ({"path": "saved", "split": "trian"}, ["it has the splits train;", "did you mean 'train'?"]),
        ({"path": "empty"}, ["empty: the directory must hold data files"]),
        ({"path": "broken"}, ["broken[train]: loading failed: JSON parse error", "check the directory"]),
        ({"path": "none.jsonl"}, ["none.jsonl: a task needs at least one row; got none"]),
        ({"path": "data"}, ["data[train]:1: the row has no field 'prompt'; it has ['question', 'solution']"]),
        (
            {"path": "sums.jsonl", "prompt_field": "questoin", "answer_field": "solution"},
            ["sums.jsonl:1: the row has no field 'questoin'", "did you mean 'question'?"],
        ),
        ({"path": "sums.jsonl", **COLUMNS, "subject_field": "kind"}, ["no field 'kind'", "set subject_field"]),
        ({"path": "sums.jsonl", **COLUMNS, "answer_after": "@"}, ["sums.jsonl:1:", "the answer after '@'"]),
        ({"path": "sums.jsonl", **COLUMNS, "template": "Q:"}, ["template must hold {prompt}", "got 'Q:'"]),
        ({"path": "sums.jsonl", "prompt_field": 3}, ["prompt_field must be a column's name", "got 3"]),
        ({"path": "sums.jsonl", "prompt_field": "a", "answer_field": "a"}, ["must differ"]),
        ({"path": "sums.jsonl", **COLUMNS, "verifier": "exakt"}, ["did you mean 'exact'"]),
        ({"path": "sums.jsonl", "prompt_field": "question", "answer_field": None}, ["compares with an answer"]),
        ({"path": "sums.jsonl", **COLUMNS, "image_field": "image"}, ["sums.jsonl:1: the row has no field 'image'"]),
        ({"path": "sums.jsonl", **COLUMNS, "on_bad_row": "drop"}, ["on_bad_row must be refuse or skip; got 'drop'"]),
        ({"path": "sums.jsonl", **COLUMNS, "picture_marker": ""}, ["picture_marker must be a text or null; got ''"]),
        ({"path": "sums.jsonl", **COLUMNS, "frame": True}, ["frame must be a whole number"]),
        ({"path": "sums.jsonl", **COLUMNS, "held_out_fraction": 2}, ["between 0 and 1", "got 2"]),
        (
            {"path": "sums.jsonl", "held_out_fraction": 0.5, "held_out_path": "x.jsonl"},
            ["one of them; got held_out_path=x.jsonl and held_out_fraction=0.5"],
        ),
        ({"path": "sums.jsonl", "split": 3}, ["split must be a text"]),
        ({"path": "sums.jsonl", "promt_field": "x"}, ["got 'promt_field'; did you mean 'prompt_field'?"]),
    ],
)
def test_a_mistake_is_one_line_with_the_rule_the_value_and_the_way_out(tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "sums.jsonl", ROWS)
    write_jsonl(tmp_path / "none.jsonl", [])
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"a": 1}\n{"a"')
    text = message(**options)
    for part in parts:
        assert part in text


def test_a_settings_object_makes_the_task_that_its_options_make(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    settings = DatasetSettings(path=path, **COLUMNS, template="Q: {prompt}", seed=3)
    task = DatasetTask.of(settings)
    assert task.settings == settings
    assert everything(task) == everything(DatasetTask(path=path, **COLUMNS, template="Q: {prompt}", seed=3))
    assert everything(FileTask.of(FileSettings(path, **COLUMNS))) == everything(FileTask(path, **COLUMNS))


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_every_field_of_the_settings_is_an_option_of_a_recipe_and_documented(kind):
    settings = {"file": FileSettings, "dataset": DatasetSettings}[kind]
    options = {field.name for field in dataclasses.fields(settings)}
    assert set(inspect.signature(TASKS[kind]).parameters) == options
    with pytest.raises(TaskError, match=r"takes the options .* got 'promt_field'; did you mean 'prompt_field'\?"):
        make_task(kind, seed=0, path="sums.jsonl", promt_field="x")
    for owner in settings.__mro__[:-1]:
        nodes = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        fields = [i for i, node in enumerate(nodes) if isinstance(node, ast.AnnAssign) and node.target.id != "_"]
        assert all(isinstance(nodes[i + 1], ast.Expr) for i in fields), f"a field of {owner.__name__} has no docstring"


def test_a_subclass_with_a_constructor_of_its_own_has_its_own_options():
    class Numbered(FileTask):
        def __init__(self, path, start: int, **options) -> None:
            super().__init__(path, **options)

    assert list(inspect.signature(Numbered).parameters) == ["path", "start", "options"]
