"""A suite of benchmarks: each is the evaluation that it would be alone, and a stop, a mistake or another suite in the
directory costs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sapo.config.recipes import load_recipe
from sapo.config.suites import load_suite
from sapo.errors import ConfigError, Interrupted, UserError
from sapo.evaluation import read_results
from sapo.rollout.local.engine import LocalEngine
from sapo.run.directory import RunDirectory
from sapo.tasks.rows.presets import PRESETS
from sapo.workflows import evaluate as evaluation_order
from sapo.workflows.evaluate import EvaluatedModel
from sapo.workflows.evaluation_plan import plan_evaluations
from sapo.workflows.suite import PlannedSuite, find_rows, plan_suite, suite_directory
from support.runs import write_model, write_recipe
from support.vision_rows import write_rows, write_vision_model
from support.zygote import run_forked

BENCHDATA = Path(__file__).parents[2] / ".." / "shared" / "benchdata"
REAL = pytest.param(
    "real",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not BENCHDATA.is_dir(), reason="the benchmark rows (../shared/benchdata) are not here"),
    ],
)
FIG6 = {"aime25": 32, "livecodebench": 8, "zebralogic": 1, "mathvision": 1}

SUITE = """
settings: {max_new_tokens: 8, problems: 6, prompt: {template: "1+{prompt}"}}
benchmarks:
  short: {task: arithmetic, digits: 1, samples: 3}
  long: {task: arithmetic, digits: 2, samples: 2, k: [1, 2], prompt: {template: "{prompt}"}}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def suite(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE)
    return str(file)


def run(planned: PlannedSuite, subject: EvaluatedModel, out: Path, **options):
    return planned.run(subject, planned.ask(subject.policy), out, **options)


def results_of(directory: Path) -> dict:
    """results.json without clocks."""
    record = json.loads((directory / "results.json").read_text())
    for benchmark in record["benchmarks"].values():
        del benchmark["timing"]
    return record


def test_a_benchmark_of_a_suite_is_the_evaluation_that_it_is_alone(model: Path, suite: str, tmp_path: Path) -> None:
    subject = EvaluatedModel.load(model, device="cpu")
    found = run(plan_suite(suite), subject, tmp_path / "out")
    (alone,) = plan_evaluations(model, ["arithmetic"], ["digits=2"], problems=6, samples=2, ks=(1, 2), max_new_tokens=8)
    assert found["long"] == alone.run(subject).evaluation
    assert (found["short"].samples, found["long"].samples) == (3, 2)
    assert {p.seen[:2] for p in found["short"].answered} == {"1+"}, "the template of the suite's settings"
    record = results_of(tmp_path / "out")
    assert record["schema"] == "sapo.suite/1"
    assert list(record["benchmarks"]) == ["short", "long"]
    for label, evaluation in found.items():
        written = record["benchmarks"][label]["results"]
        assert written[f"mean@{evaluation.samples}"] == evaluation.mean.to_json()
        assert (
            read_results(tmp_path / "out" / label)["results"][f"mean@{evaluation.samples}"]
            == written[f"mean@{evaluation.samples}"]
        )


@pytest.mark.parametrize("stop_after", [2, 9])
def test_a_suite_that_was_stopped_goes_on_to_the_same_results(
    model: Path, suite: str, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first benchmark, and in its second."""
    monkeypatch.setattr(evaluation_order, "CHUNK_SEQUENCES", 6)
    subject, planned = EvaluatedModel.load(model, device="cpu"), plan_suite(suite)
    run(planned, subject, tmp_path / "whole")
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * stop_after

    with pytest.raises(Interrupted):
        run(planned, subject, tmp_path / "out", should_stop=should_stop)
    assert not (tmp_path / "out" / "results.json").exists()
    run(planned, subject, tmp_path / "out")
    assert results_of(tmp_path / "out") == results_of(tmp_path / "whole")
    for label in ("short", "long"):
        kept = [(tmp_path / name / label / "completions.jsonl").read_bytes() for name in ("out", "whole")]
        assert kept[0] == kept[1]


def test_a_finished_suite_is_counted_again_without_drawing(
    model: Path, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = EvaluatedModel.load(model, device="cpu")
    run(plan_suite(suite), subject, tmp_path / "out")
    monkeypatch.setattr(LocalEngine, "generate", lambda *_: pytest.fail("it draws"))
    found = run(plan_suite(suite, ks=(1, 2)), subject, tmp_path / "out")
    assert set(found["short"].pass_at) == {1, 2}


def test_overrides_reach_one_benchmark_the_prompts_of_all_and_options_the_settings_of_all(suite: str) -> None:
    overrides = ["short.samples=5", "short.digits=3", "long.prompt.template=Q: {prompt}", "prompt.style=plain"]
    planned = plan_suite(suite, overrides, temperature=0.5)
    short, long = planned.benchmarks["short"], planned.benchmarks["long"]
    assert (short.settings.samples, long.settings.samples) == (5, 2)
    assert (short.task.name, long.task.name) == ("add3", "add2")
    assert (short.prompt_format.template, long.prompt_format.template) == ("1+{prompt}", "Q: {prompt}")
    assert {p.settings.params.temperature for p in planned.benchmarks.values()} == {0.5}
    assert list(plan_suite(suite, ["long=null"]).benchmarks) == ["short"]
    assert {p.settings.samples for p in plan_suite(suite, ["short.samples=5"], samples=2).benchmarks.values()} == {2}


EPISODES = """
settings: {max_new_tokens: 6, problems: 3, samples: 2, turns: {max: 4}}
benchmarks:
  calculator: {turns: {max: 2}}
  played: {task: calculator}
  sums: {task: arithmetic, digits: 1}
"""


def test_episodes_of_a_suite_are_those_of_the_task_alone(tmp_path: Path) -> None:
    file = tmp_path / "episodes.yaml"
    file.write_text(EPISODES)
    model = write_model(tmp_path / "model")
    subject = EvaluatedModel.load(model, device="cpu")
    planned = plan_suite(str(file), ["turns.play_in=driver"], model=model)
    assert [p.settings.turns.max for p in planned.benchmarks.values()] == [2, 4, 4]
    found = run(planned, subject, tmp_path / "out")
    given = {"problems": 3, "samples": 2, "max_new_tokens": 6}
    (alone,) = plan_evaluations(model, ["calculator"], ["turns.max=2", "turns.play_in=driver"], **given)
    assert found["calculator"] == alone.run(subject).evaluation


def test_limits_of_episodes_are_set_for_one_for_all_and_by_the_run(tmp_path: Path) -> None:
    file, plain = tmp_path / "episodes.yaml", tmp_path / "plain.yaml"
    file.write_text(EPISODES)
    plain.write_text("benchmarks: {calculator: {}, sums: {task: arithmetic}}")
    changes = {"tasks": [{"name": "calculator"}], "rollout__turns": {"max": 3, "env": ["MY_KEY"]}}
    RunDirectory.create(load_recipe(write_recipe(tmp_path, **changes))).close()
    of_run = tmp_path / "run"

    def limits(suite: Path, *overrides: str) -> list[tuple[int, list[str]]]:
        planned = plan_suite(str(suite), overrides, model=of_run).benchmarks.values()
        return [(p.settings.turns.max, p.settings.turns.env) for p in planned]

    own = ["MY_KEY"]
    assert limits(file) == [(2, own), (4, own), (4, own)]
    assert limits(plain) == [(3, own)] * 2
    assert limits(file, "turns.env=[X]", "played.turns.max=1") == [(2, ["X"]), (1, ["X"]), (4, ["X"])]
    assert limits(file, "turns.max=7") == [(7, own)] * 3
    for overrides, words in (
        (["sums.turns.max=2"], "^sums: turns.* are limits of environments; got turns.max for add1"),
        (["calculator=null", "played=null", "turns.max=2"], "got turns.max for add1"),
        (["played.turns.maximum=2"], "^played: unknown key rollout.turns.maximum"),
    ):
        with pytest.raises(ConfigError, match=words):
            limits(file, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["digits=3"], "a setting of a suite must be written BENCHMARK.KEY=VALUE"),
        (["shrt.digits=3"], "its benchmarks are short, long"),
        (["short=3"], "BENCHMARK=null to leave one out"),
        (["short.digit=3"], "short: task 'arithmetic' takes the options"),
        (["short.samples=none"], "short: samples: input should be a valid integer"),
        (["short.samples=0"], "short: samples: input should be greater than or equal to 1; got 0"),
        (["short.k=[8]"], "short: every k must lie in 1..samples (3); got 8"),
        (["long.top_p=2"], "long: --top-p must lie in (0, 1]"),
        (["prompt.styl=chat"], "short: unknown key prompt.styl; did you mean prompt.style?"),
        (["long.task=arithmatic"], "long: a task must be one of"),
        (["short=null", "long=null"], "a suite must keep a benchmark; all of mine were left out"),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_names_the_benchmark(
    suite: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError) as refusal:
        plan_suite(suite, overrides)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 3", "is no suite: it has no `benchmarks`"),
        ("benchmarks: {}", "benchmarks: dictionary should have at least 1 item"),
        ("benchmarks: {a.b: {task: arithmetic}}", "must be letters, digits, _ and -"),
        ("benchmarks: {path: {task: arithmetic}}", "and not path, prompt or turns; got 'path'"),
        ("benchmarks: {a: {task: arithmetic}}\nsetings: {}", "unknown key setings; did you mean settings?"),
        ("benchmarks: {a: {task: arithmetic, greedy: 3}}", "benchmarks.a.greedy"),
        ("settings: {digits: 3}\nbenchmarks: {a: {task: arithmetic}}", "unknown key settings.digits"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        plan_suite(str(file))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_suite_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no shipped suite of that name; did you mean paper_fig6\?"):
        load_suite("paper_fig")


def test_rows_are_found_by_the_name_of_the_benchmark(tmp_path: Path) -> None:
    for name in ("aime25.jsonl", "aime25_old.jsonl", "zebra_12.jsonl", "code_a.jsonl", "code_b.parquet", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "vision").mkdir()
    assert find_rows(tmp_path, "aime25").name == "aime25.jsonl"
    assert find_rows(tmp_path, "zebra").name == "zebra_12.jsonl"
    assert find_rows(tmp_path, "vision").name == "vision"
    with pytest.raises(ConfigError, match=r"got code_a\.jsonl, code_b\.parquet in .*; give code\.path=FILE"):
        find_rows(tmp_path, "code")
    with pytest.raises(ConfigError, match=r"got none in .*; give notes\.path=FILE, or leave it out with notes=null"):
        find_rows(tmp_path, "notes")
    with pytest.raises(ConfigError, match=r"path must be a directory with the rows of each benchmark"):
        find_rows(tmp_path / "aime25.jsonl", "aime25")


def test_what_a_directory_holds_already_is_left_alone(
    model: Path, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subject, planned = EvaluatedModel.load(model, device="cpu"), plan_suite(suite)
    asked = planned.ask(subject.policy)
    assert suite_directory(model, subject, planned, asked) == (Path("evals/model-mine"), None)
    planned.run(subject, asked, Path("evals/model-mine"))
    assert suite_directory(model, subject, planned, asked) == (Path("evals/model-mine"), None)
    other = plan_suite(suite, ["long.samples=3"])
    directory, note = suite_directory(model, subject, other, other.ask(subject.policy))
    assert directory == Path("evals/model-mine-2")
    assert "in long another evaluation, with samples=2 where this one has 3" in str(note)
    monkeypatch.setattr(LocalEngine, "generate", lambda *_: pytest.fail("it draws before it has looked"))
    with pytest.raises(ConfigError, match=r"holds in long another evaluation, .*; name another directory with --out"):
        run(other, subject, Path("evals/model-mine"))
    sapo_out = tmp_path / "single"
    sapo_out.mkdir()
    (sapo_out / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds no suite of benchmarks but notes\.txt"):
        run(planned, subject, sapo_out)


def test_a_benchmark_that_cannot_be_asked_is_named_before_anything_is_drawn(
    model: Path, suite: str, tmp_path: Path
) -> None:
    subject, planned = EvaluatedModel.load(model, device="cpu"), plan_suite(suite, ["long.max_new_tokens=60"])
    with pytest.raises(ConfigError, match=r"^long: --max-new-tokens must leave room"):
        planned.ask(subject.policy)


def test_the_shipped_suite_is_the_papers() -> None:
    """Samples of AIME25 and LiveCodeBench, and release v6, which is six files (arXiv 2511.20347, Fig. 6)."""
    _, suite = load_suite("paper_fig6")
    assert {name: b.samples for name, b in suite.benchmarks.items()} == FIG6
    assert {name: b.problems for name, b in suite.benchmarks.items()} == {
        "aime25": 30,
        "livecodebench": 1055,
        "zebralogic": 1000,
        "mathvision": 3040,
    }
    assert PRESETS["livecodebench"].data_files[-1] == "test6.jsonl"


@pytest.mark.parametrize("rows", ["own", REAL])
def test_the_four_evaluations_of_fig_6_are_one_command(rows: str, tmp_path: Path) -> None:
    """From rows to one table and one file; the same command again draws nothing and says so."""
    directory = write_rows(tmp_path / "rows") if rows == "own" else BENCHDATA.resolve()
    files = [find_rows(directory, label) for label in FIG6]
    write_vision_model(tmp_path / "model", files, max_length=16384)
    command = ["eval", "model", "--suite", "paper_fig6", f"path={directory}", "--max-new-tokens", "4"]
    command += ["--problems", "2"]

    def sapo_eval() -> str:
        done = run_forked(*command, cwd=tmp_path, env={**os.environ, "COLUMNS": "140"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = sapo_eval()
    record = json.loads((tmp_path / "evals/model-paper_fig6/results.json").read_text())
    assert {name: b["results"]["samples"] for name, b in record["benchmarks"].items()} == FIG6
    for label in FIG6:
        (row,) = [line for line in shown.splitlines() if line.startswith(f"│ {label}")]
        assert [cell.strip() for cell in row.strip("│").split("│")][1:3] == ["2", str(FIG6[label])]
        assert (tmp_path / "evals/model-paper_fig6" / label / "index.html").is_file()
    again = sapo_eval()
    assert again.count("is finished already") == 4
    assert json.loads((tmp_path / "evals/model-paper_fig6/results.json").read_text()) == record
