"""Benchmark presets on their real rows: every row becomes a prompt with the right text, answer and subject.

The rows are read where they stand, beside the checkout; their licences do not let them be copied into it.
"""

import base64
import json
import pickle
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sapo.errors import TaskError
from sapo.tasks import PRESETS, VERIFIERS, make_task
from sapo.tasks.rows.presets import ALIASES
from sapo.tasks.verifiers import build_verifier
from sapo.tasks.verifiers.code import CodeTests

BENCHMARKS = Path(__file__).parents[2] / ".." / "shared" / "benchdata"

needs_rows = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"the benchmarks' rows are not at {BENCHMARKS}")

BOXED = "\nPut your final answer within \\boxed{}."
AIME = BOXED + " The answer is an integer between 0 and 999 inclusive."


@pytest.fixture(autouse=True)
def every_verifier(monkeypatch):
    """Presets name verifiers; what they say of answers is not tested here."""
    for name in ("math", "boxed_integer", "choice", "zebra", "code"):
        if name not in VERIFIERS:
            monkeypatch.setitem(VERIFIERS, name, VERIFIERS["exact"])


def rows_of(name):
    with (BENCHMARKS / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompts_of(preset, name, **options):
    """The prompts of all rows, in the order of rows as `text_of` finds them."""
    task = make_task(preset, seed=0, path=BENCHMARKS / f"{name}.jsonl", **options)
    return task, {prompt.text: prompt for prompt in task.held_out(10_000)}


# ------------------------------------------------------------------------------------------------------- mathematics


@needs_rows
@pytest.mark.parametrize(
    ("preset", "name", "question", "wording", "count"),
    [
        ("gsm8k", "gsm8k_test", "question", BOXED, 1319),
        ("math500", "math500_full", "problem", BOXED, 500),
        ("aime25", "aime25", "problem", AIME, 30),
        ("aime24", "aime25", "problem", AIME, 30),  # the columns are the same but for a capital letter
        ("hmmt25", "hmmt_feb_2025", "problem", BOXED, 30),
        ("hmmt25_feb", "hmmt_feb_2025", "problem", BOXED, 30),
        ("hmmt25_nov", "hmmt_nov_2025", "problem", BOXED, 30),
        ("beyond_aime", "beyond_aime", "problem", BOXED + " The answer is an integer.", 100),
    ],
)
def test_every_row_of_mathematics_becomes_a_held_out_prompt(preset, name, question, wording, count):
    task, prompts = prompts_of(preset, name)
    rows = rows_of(name)
    assert len(rows) == len(prompts) == task.num_held_out == count
    for row in rows:
        prompt = prompts[row[question] + wording]
        answer = row["answer"].rpartition("####")[2].strip() if preset == "gsm8k" else str(row["answer"])
        assert prompt.answer == answer
        subject = row.get("subject") or (", ".join(row["problem_type"]) if "problem_type" in row else None)
        assert prompt.metadata.get("subject") == subject
        kept = {key: value for key, value in row.items() if key not in (question, "answer", "subject")}
        assert kept.items() <= prompt.metadata.items()
    assert task.prefers_chat
    assert task.name == ALIASES.get(preset, preset)


@needs_rows
def test_subjects_of_math500_are_those_of_its_rows():
    _, prompts = prompts_of("math500", "math500_full")
    subjects = Counter(prompt.metadata["subject"] for prompt in prompts.values())
    # The counts of the published MATH-500, which sum to 500.
    assert subjects == {
        "Algebra": 124,
        "Intermediate Algebra": 97,
        "Prealgebra": 82,
        "Number Theory": 62,
        "Precalculus": 56,
        "Geometry": 41,
        "Counting & Probability": 38,
    }


@needs_rows
def test_gsm8k_keeps_the_worked_solution_for_examples():
    path = BENCHMARKS / "gsm8k_test.jsonl"
    task = make_task("gsm8k", seed=0, path=path, held_out_fraction=0.1)
    assert task.num_train + task.num_held_out == 1319
    assert 80 < task.num_held_out < 180  # about a tenth
    solutions = {row["question"] + BOXED: row["answer"] for row in rows_of("gsm8k_test")}
    for question, solution in task.shots(4):
        assert solution == solutions[question]
        assert "####" in solution


# ------------------------------------------------------------------------------------------------------------ logic


@needs_rows
def test_every_puzzle_of_zebralogic_is_asked_with_the_form_of_its_solution():
    _, prompts = prompts_of("zebralogic", "zebralogic_12")
    rows = {row["id"]: row for row in rows_of("zebralogic_12")}
    assert len(prompts) == len(rows) == 12
    for text, prompt in prompts.items():
        row = rows[prompt.metadata["id"]]
        assert text.startswith(row["puzzle"].strip())
        form = json.loads(text[text.index("{\n") :])["solution"]
        solution = row["solution"]
        assert list(form) == [f"House {house}" for house, *_ in solution["rows"]]
        for cells in form.values():
            assert cells == dict.fromkeys(solution["header"][1:], "...")
        assert (prompt.metadata["solution"], prompt.metadata["subject"]) == (solution, row["size"])
        assert prompt.answer is None


def test_a_puzzle_whose_solution_is_blanked_out_is_refused(tmp_path):
    solution = {"header": ["House", "Name"], "rows": [["1", "___"], ["2", "___"]]}
    path = tmp_path / "zebra.jsonl"
    path.write_text(json.dumps({"id": "a", "size": "2*1", "puzzle": "Who?", "solution": solution}))
    with pytest.raises(TaskError, match=r"zebra\.jsonl:1: its solution is blanked out, .* set path="):
        make_task("zebralogic", seed=0, path=path)
    path.write_text(json.dumps({"id": "a", "size": "2*1", "puzzle": "Who?", "solution": "Bob"}))
    with pytest.raises(TaskError, match="must be an object with header and rows; got 'Bob'"):
        make_task("zebralogic", seed=0, path=path)


# ------------------------------------------------------------------------------------------------------------- code


@needs_rows
def test_every_row_of_humaneval_carries_its_tests():
    _, prompts = prompts_of("humaneval", "humaneval")
    rows = {row["task_id"]: row for row in rows_of("humaneval")}
    assert len(prompts) == len(rows) == 164
    for text, prompt in prompts.items():
        row = rows[prompt.metadata["task_id"]]
        assert f"```python\n{row['prompt'].rstrip()}\n```" in text
        tests = CodeTests.from_json(prompt.metadata["tests"])
        assert (tests.kind, tests.function, tests.prefix) == ("unit", row["entry_point"], row["prompt"])
        assert row["test"] in tests.statements[0]


@needs_rows
def test_every_row_of_livecodebench_carries_its_public_tests():
    _, prompts = prompts_of("livecodebench", "livecodebench_3")
    rows = {row["question_id"]: row for row in rows_of("livecodebench_3")}
    assert len(prompts) == len(rows) == 3
    for text, prompt in prompts.items():
        row = rows[prompt.metadata["question_id"]]
        question = f"{row['question_title']}\n\n{row['question_content'].strip()}"
        assert text.startswith(f"{question}\n\nWrite a Python program that reads the input from stdin")
        tests = CodeTests.from_json(prompt.metadata["tests"])
        public = json.loads(row["public_test_cases"])
        assert tests.cases == tuple((case["input"], case["output"]) for case in public)
        assert tests.kind == public[0]["testtype"] == "stdin"
        assert prompt.metadata["subject"] == row["difficulty"]
        assert "public_test_cases" not in prompt.metadata


def livecodebench_row(**columns):
    case = {"input": "[1]\n2", "output": "3", "testtype": "functional"}
    private = json.dumps([{**case, "output": "4"}])
    return {
        "question_title": "Sum",
        "question_content": "Add.",
        "platform": "leetcode",
        "question_id": "7",
        "contest_id": "c",
        "contest_date": "2025-01-01T00:00:00",
        "starter_code": "class Solution:\n    def add(self, a, b):\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps([case]),
        # As release v6 has them: a pickled string of JSON, compressed, in base 64.
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(private))).decode(),
        "metadata": json.dumps({"func_name": "add"}),
        **columns,
    }


def test_a_row_of_livecodebench_v6_has_its_private_tests_and_its_starter_code(tmp_path):
    path = tmp_path / "lcb.jsonl"
    path.write_text(json.dumps(livecodebench_row()))
    prompt = make_task("livecodebench", seed=0, path=path).held_out(1)[0]
    assert "Complete this Python code:\n```python\nclass Solution:\n    def add(self, a, b):\n```" in prompt.text
    tests = CodeTests.from_json(json.loads(json.dumps(prompt.metadata["tests"])))
    assert (tests.kind, tests.function, tests.cases) == ("functional", "add", (("[1]\n2", "3"), ("[1]\n2", "4")))
    path.write_text(json.dumps(livecodebench_row(private_test_cases="AAAA")))
    with pytest.raises(TaskError, match="livecodebench, question 7: "):
        make_task("livecodebench", seed=0, path=path).held_out(1)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "Write a function.", "test_setup_code": "import math", "challenge_test_list": []},
        {"prompt": "Write a function.", "test_imports": ["import math"]},
    ],
)
def test_both_configurations_of_mbpp_carry_their_assertions_and_show_them(tmp_path, columns):
    path = tmp_path / "mbpp.jsonl"
    row = {"task_id": 11, "code": "def f(): return 1", "test_list": ["assert f() == 1", "assert f() < 2"], **columns}
    path.write_text(json.dumps(row))
    prompt = make_task("mbpp", seed=0, path=path).held_out(1)[0]
    shown = "The code must pass these tests:\nassert f() == 1\nassert f() < 2\n"
    assert prompt.text.startswith(f"Write a function.\n{shown}")
    tests = CodeTests.from_json(prompt.metadata["tests"])
    assert (tests.kind, tests.statements, tests.setup) == ("unit", tuple(row["test_list"]), "import math")
    assert "test_list" not in prompt.metadata
    path.write_text(json.dumps({**row, "test_list": "assert f()"}))
    with pytest.raises(TaskError, match=r"mbpp\.jsonl:1: field 'test_list' must be a list of assertions"):
        make_task("mbpp", seed=0, path=path)


# ----------------------------------------------------------------------------------------------------------- images


@needs_rows
def test_every_row_of_mathvision_shows_its_picture_and_has_its_options_by_letter():
    _, prompts = prompts_of("mathvision", "mathvision_testmini_40")
    rows = {row["id"]: row for row in rows_of("mathvision_testmini_40")}
    assert len(prompts) == len(rows) == 40
    for text, prompt in prompts.items():
        row = rows[prompt.metadata["id"]]
        assert text.startswith(row["question"])
        assert text.endswith(BOXED)
        for letter, option in zip("ABCDE", row["options"], strict=False):
            assert f"\n({letter}) {option}\n" in text
        assert (prompt.answer, prompt.metadata["options"]) == (row["answer"], row["options"])
        assert prompt.metadata["subject"] == row["subject"]
        (shown,) = prompt.pictures
        assert shown.path == str((BENCHMARKS / row["image"]).resolve())
        assert "<image" in text  # the markers stay text


@needs_rows
@pytest.mark.slow
def test_every_reference_of_mathvision_is_right_and_junk_is_not():
    _, prompts = prompts_of("mathvision", "mathvision_testmini_40")
    judge = build_verifier("choice_or_math")
    for prompt in prompts.values():
        for text in (rf"So \boxed{{{prompt.answer}}}.", f"The answer is {prompt.answer}", prompt.answer):
            score = judge(text, prompt)
            assert score.reward == 1.0, (text, prompt)
            assert score.figures["answered_by_letter"] == float(prompt.answer in tuple("ABCDE"))
        if prompt.answer in tuple("ABCDE"):
            assert judge(rf"\boxed{{({prompt.answer})}}", prompt).reward == 1.0
            assert judge(f"The answer is ({prompt.answer.lower()}).", prompt).reward == 1.0
        for text in ("", "I do not know.", r"\boxed{}", r"\boxed{Z}", r"\boxed{123456}", "<image1>"):
            assert judge(text, prompt).reward == 0.0, (text, prompt)


# -------------------------------------------------------------------------------------------------------- the table


def test_every_preset_names_its_repository_licence_wording_and_verifier():
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.dataset.count("/") == 1
        assert preset.licence
        assert "{prompt}" in preset.template
    assert {preset.verifier for preset in PRESETS.values()} == {
        "math",
        "boxed_integer",
        "choice_or_math",
        "zebra",
        "code",
    }


@needs_rows
def test_presets_have_the_licences_that_came_with_the_rows():
    table = (BENCHMARKS / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")]
    licences = {name.split(".")[0]: licence for names, _, _, licence in cells for name in names.split(", ")}
    files = {
        "aime25": "aime25",
        "hmmt25_feb": "hmmt_feb_2025",
        "hmmt25_nov": "hmmt_nov_2025",
        "beyond_aime": "beyond_aime",
        "math500": "math500_full",
        "gsm8k": "gsm8k_test",
        "humaneval": "humaneval",
        "zebralogic": "zebralogic_12",
        "livecodebench": "livecodebench_3",
        "mathvision": "mathvision_testmini_40",
    }
    for preset, file in files.items():
        # The table leaves the version of CC0 out and writes cc in small letters.
        assert PRESETS[preset].licence.upper().startswith(licences[file].upper())


def test_without_a_path_a_preset_asks_the_hub_for_its_splits(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path, **arguments):
        asked.append((path, arguments.get("name"), arguments["split"]))
        answer = "#### 1" if "gsm8k" in path else "1"
        other = {"question": f"{arguments['split']}?", "answer": answer, "problem": "p"}
        return datasets.Dataset.from_list([other])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("sapo.tasks.rows.hub._hub_answers", lambda library: True)
    task = make_task("gsm8k", seed=0)
    assert (task.num_train, task.num_held_out) == (1, 1)
    make_task("aime25", seed=0)
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("MathArena/aime_2025", None, "train"),
    ]


def test_a_preset_trains_when_told_what_to_hold_out(tmp_path):
    rows = [{"problem": f"p{i}", "answer": i} for i in range(60)]
    path, other = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:50]))
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[50:]))
    task = make_task("aime25", seed=0, path=path, held_out_path=other)
    assert (task.num_train, task.num_held_out) == (50, 10)
    assert task.train_prompt(0).text.endswith(AIME)
    assert make_task("aime25", seed=0, path=path, held_out_fraction=0.2).num_train < 50
    with pytest.raises(TaskError, match="aime25: all 50 rows are held out for evaluation"):
        make_task("aime25", seed=0, path=path).train_prompt(0)


def test_a_recipe_overrides_a_preset_and_a_preset_of_ones_own_is_as_short(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "p", "answer": 1}))
    task = make_task("aime25", seed=0, path=path, template="Q: {prompt}", verifier="exact", name="mine")
    assert (task.name, task.held_out(1)[0].text, task.verify("1", task.held_out(1)[0]).reward) == ("mine", "Q: p", 1.0)
    mine = replace(PRESETS["aime25"], name="mine", template="A: {prompt}", licence="MIT")
    assert mine(path=path).held_out(1)[0].text == "A: p"


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("aime26", {}, ["a task must be one of", "did you mean 'aime25'?"]),
        ("aime25", {"pth": "x"}, ["takes the options", ", path, split,", "got 'pth'; did you mean 'path'?"]),
        ("aime25", {"dataset": "x"}, ["got 'dataset'"]),
        ("aime25", {"adapt": "x"}, ["got 'adapt'"]),
    ],
)
def test_an_option_that_is_none_of_a_presets_is_refused(kind, options, parts):
    with pytest.raises(TaskError) as caught:
        make_task(kind, seed=0, **options)
    for part in parts:
        assert part in str(caught.value)
