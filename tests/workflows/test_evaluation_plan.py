"""What `sapo eval` makes of what it is asked: overrides, tasks and files, and a run's own way of evaluating."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import sapo
from sapo.config import PromptConfig
from sapo.config.rollout import TurnsConfig
from sapo.errors import ConfigError, TaskError
from sapo.run.directory import RunDirectory
from sapo.utils.hashing import seed_for
from sapo.workflows.evaluate import EvaluatedModel, EvaluationSettings, PlannedEvaluation
from sapo.workflows.evaluation_plan import output_directory, plan_evaluations, plan_task_evaluation, split_overrides
from sapo.workflows.generate import plan_problem
from support.runs import write_model, write_recipe


@pytest.fixture(autouse=True)
def rewards_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))


def run_of(tmp_path: Path, **changes) -> Path:
    """A run directory as training leaves it, but for the training."""
    from sapo.config.recipes import load_recipe

    config = load_recipe(write_recipe(tmp_path, **changes))
    RunDirectory.create(config).close()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("prompt.style=chat", "style", "chat"),
        ("prompt.thinking=true", "thinking", True),
        ("prompt.thinking=null", "thinking", None),
        ("prompt.shots=4", "shots", 4),
        ('prompt.stop=["\\n"]', "stop", ["\n"]),
        ('prompt.stop=["\\n", "Q:"]', "stop", ["\n", "Q:"]),
        ("prompt.template=Q: {prompt}\\nA:", "template", "Q: {prompt}\nA:"),
        ('prompt.template="Q: {prompt}\\nA:"', "template", "Q: {prompt}\nA:"),
        ("prompt.template={prompt}", "template", "{prompt}"),
        ("prompt.answer_template= {answer}\\n\\n", "answer_template", " {answer}\n\n"),
        ("prompt.system=You are terse: no words.", "system", "You are terse: no words."),
        ("prompt.system=null", "system", None),
        ("prompt.system=42", "system", "42"),
        ("prompt.shots=[{prompt: 1 + 1 =, answer: '2'}]", "shots", [{"prompt": "1 + 1 =", "answer": "2"}]),
    ],
)
def test_an_override_of_the_prompt_is_read_as_it_is_meant(override: str, key: str, value: object) -> None:
    assert split_overrides(["digits=4", override]) == ({"digits": 4}, {key: value})
    if key != "shots":
        assert getattr(PromptConfig(**{key: value}), key) == value


def test_texts_of_a_task_are_taken_as_they_stand() -> None:
    options, _ = split_overrides(["template=Q: {prompt}", "answer_after=####", "verifier=math"])
    assert options == {"template": "Q: {prompt}", "answer_after": "####", "verifier": "math"}


def test_the_prompt_settings_reach_the_prompt_and_the_others_the_task() -> None:
    planned = plan_task_evaluation(
        "arithmetic", ["digits=2", "prompt.template=Q: {prompt}", 'prompt.stop=[";"]'], EvaluationSettings()
    )
    assert planned.task.name == "add2"
    assert planned.prompt_format.template == "Q: {prompt}"
    assert planned.prompt_format.stop == (";",)
    assert planned.task_about["options"] == {"digits": 2}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt.styl=chat"], "unknown key prompt.styl; did you mean prompt.style?"),
        (["prompt.style=shout"], "prompt.style: input should be 'auto', 'plain' or 'chat'; got 'shout'"),
        (["prompt.template=no place"], "template must hold {prompt}; got 'no place'"),
        (["prompt.shots=2"], "asks task 'add4' for examples and it has none; write them in the recipe"),
        (["prompt.shots=-1"], "shots must be 0 or more"),
        (["digits"], "an override is written key=value; got 'digits'"),
        (["digit=4"], "did you mean 'digits'?"),
    ],
)
def test_a_mistake_in_an_override_is_one_clear_line(overrides: list[str], words: str) -> None:
    with pytest.raises((ConfigError, TaskError)) as refusal:
        plan_evaluations(Path("nowhere"), ["arithmetic"], overrides)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_is_a_task(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(40)))
    (planned,) = plan_evaluations(Path("nowhere"), [str(file)], ["verifier=last_number"], samples=8, ks=(1, 8))
    assert planned.task.name == "sums"
    assert planned.task_about["options"] == {"path": str(file), "verifier": "last_number", "held_out_fraction": 1}
    assert (planned.settings.samples, planned.settings.ks) == (8, (1, 8))


def write_sums(file: Path, numbers: list[int]) -> Path:
    file.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in numbers))
    return file


def test_all_rows_are_evaluated_and_it_is_said_how_many(tmp_path: Path) -> None:
    file = write_sums(tmp_path / "sums.jsonl", [*range(300), 5])
    policy = EvaluatedModel.load(write_model(tmp_path / "model"), device="cpu").policy

    def asked(kind: str, overrides: list[str], **given: int) -> tuple[int, str]:
        options = [f"path={file}", "verifier=last_number", *overrides] if kind != str(file) else overrides
        (planned,) = plan_evaluations(Path("nowhere"), [kind], options, max_new_tokens=4, **given)
        prompts = planned.ask(policy)
        return len(prompts), planned.extent(prompts)

    whole = "sums: 300 of 300 held-out problems (besides 1 rows that repeat one)"
    assert asked(str(file), ["verifier=last_number"]) == (300, whole), "300 questions, one of them twice"
    assert asked("file", []) == asked("dataset", []) == (300, whole)
    part = "sums: 256 of 300 held-out problems (besides 1 rows that repeat one); --problems 300 takes all"
    assert asked("file", [], problems=256) == (256, part)
    assert asked("file", [], problems=400)[1].endswith("; 400 were asked for")
    some, _ = asked("file", ["held_out_fraction=0.1"])
    assert 10 <= some <= 50, "a share that is asked for: 30 of 300 on average"


def test_a_benchmark_is_evaluated_whole(tmp_path: Path) -> None:
    rows = ({"question": f"{i}+1=", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(1319))
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = EvaluatedModel.load(write_model(tmp_path / "model"), device="cpu").policy
    options = [f"path={file}", "template={prompt}"]  # the model of the tests has no letters
    (planned,) = plan_evaluations(Path("nowhere"), ["gsm8k"], options, max_new_tokens=4)
    prompts = planned.ask(policy)
    assert planned.extent(prompts) == "gsm8k: 1,319 of 1,319 held-out problems"
    assert len({prompt.text for prompt in prompts}) == 1319


def test_generated_problems_are_256_unless_another_number_is_asked_for(tmp_path: Path) -> None:
    policy = EvaluatedModel.load(write_model(tmp_path / "model"), device="cpu").policy
    (planned,) = plan_evaluations(Path("nowhere"), ["arithmetic"], ["digits=3"], max_new_tokens=4)
    assert planned.extent(planned.ask(policy)) == "add3: 256 generated problems; --problems sets how many"


def test_several_tasks_make_several_evaluations() -> None:
    made = plan_evaluations(
        Path("nowhere"), ["arithmetic", "arithmetic"], ["digits=3"], temperature=0.5, max_new_tokens=9
    )
    assert [o.task.name for o in made] == ["add3", "add3"]
    assert {o.settings.params.temperature for o in made} == {0.5}
    assert {o.settings.params.max_new_tokens for o in made} == {9}


def test_the_defaults_are_those_that_help_shows() -> None:
    (planned,) = plan_evaluations(Path("nowhere"), ["arithmetic"], [], samples=None, temperature=None)
    params = planned.settings.params
    assert (planned.settings.problems, planned.settings.samples, planned.settings.ks) == (None, 4, (1,))
    assert (params.max_new_tokens, params.temperature, params.top_p) == (64, 1.0, 1.0)
    assert (params.seed, planned.task_about["seed"]) == (seed_for(12345, "evaluation"), 12345)
    assert (planned.settings.greedy, planned.settings.constant) == (False, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ks": (1, 8)}, "every k must lie in 1..samples (4); got 1,8; raise --samples"),
        ({"top_p": 2.0}, "--top-p must lie in (0, 1]"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
    ],
)
def test_a_mistake_in_an_option_is_one_clear_line(given: dict, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_evaluations(Path("nowhere"), ["arithmetic"], [], **given)
    assert words in str(refusal.value)


def test_a_run_is_evaluated_as_it_evaluates_itself(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        prompt__template="Q: {prompt}",
        prompt__stop=[";"],
        rollout__temperature=0.8,
        rollout__top_p=0.9,
        rollout__top_k=5,
        rollout__stop_token_ids=[3],
        eval={"problems": 7, "samples": 3, "k": [1, 3], "seed": 99},
    )
    (planned,) = plan_evaluations(run, [], [])
    params = planned.settings.params
    assert planned.task.name == "prompts"
    assert planned.task.score_truncated
    assert planned.prompt_format.template == "Q: {prompt}"
    assert planned.prompt_format.stop == (";",)
    assert (planned.settings.problems, planned.settings.samples, planned.settings.ks) == (7, 3, (1, 3))
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.8, 0.9, 5, 12)
    assert params.stop_token_ids == frozenset({3})
    assert params.seed == seed_for(99, "evaluation"), "as in the loop: the same draws"
    assert planned.task_about["seed"] == 99


def test_what_is_said_of_a_run_is_changed_and_nothing_else(tmp_path: Path) -> None:
    run = run_of(tmp_path, prompt__template="Q: {prompt}", eval={"problems": 7, "samples": 4, "k": [1, 4]})
    (planned,) = plan_evaluations(run, [], ["prompt.system=Think."], samples=2, temperature=0.0)
    assert (planned.settings.problems, planned.settings.samples, planned.settings.ks) == (7, 2, (1,))
    assert planned.settings.params.temperature == 0.0
    assert (planned.prompt_format.template, planned.prompt_format.system) == ("Q: {prompt}", "Think.")
    with pytest.raises(ConfigError, match=r"got verifier=...; name the task with --task"):
        plan_evaluations(run, [], ["verifier=exact"])


@pytest.mark.parametrize("own", [{"greedy": True, "constant": True}, {"greedy": False, "constant": False}])
def test_a_run_s_greedy_completion_and_constant_answer_are_its_own_unless_the_command_says_otherwise(
    tmp_path: Path, own: dict[str, bool]
) -> None:
    run = run_of(tmp_path, eval=own)

    def figures(**given: bool | None) -> tuple[bool, bool]:
        (planned,) = plan_evaluations(run, [], [], **given)
        return planned.settings.greedy, planned.settings.constant

    assert figures(greedy=None, constant=None) == (own["greedy"], own["constant"])
    assert figures(greedy=not own["greedy"]) == (not own["greedy"], own["constant"])
    assert figures(constant=not own["constant"]) == (own["greedy"], not own["constant"])


def test_a_seed_that_is_given_draws_as_a_run_of_that_seed_does(tmp_path: Path) -> None:
    run = run_of(tmp_path, eval__seed=7)
    file = tmp_path / "prompts.jsonl"
    (own,) = plan_evaluations(run, [], [])
    (given,) = plan_evaluations(run, [], [], seed=7)
    share = ["verifier=exact", "held_out_fraction=0.1"]
    (named,) = plan_evaluations(Path("nowhere"), [str(file)], share, seed=7)
    (other,) = plan_evaluations(run, [], [], seed=8)
    assert own.settings.params.seed == given.settings.params.seed == named.settings.params.seed
    assert [p.text for p in own.task.held_out(2)] == [p.text for p in named.task.held_out(2)]
    assert other.settings.params.seed == seed_for(8, "evaluation")
    assert (given.task_about["seed"], named.task_about["seed"], other.task_about["seed"]) == (7, 7, 8)


def test_each_task_of_a_run_is_put_in_its_own_format(tmp_path: Path) -> None:
    tasks = [
        {"name": "arithmetic", "digits": 1},
        {"name": "arithmetic", "digits": 2, "label": "two", "prompt": {"template": "{prompt}?"}},
    ]
    made = plan_evaluations(run_of(tmp_path, tasks=tasks, eval__temperature=0.3), [], [])
    assert [(o.task.name, o.prompt_format.template) for o in made] == [("add1", "{prompt}"), ("two", "{prompt}?")]
    assert made[0].settings.params.temperature == 0.3, "the evaluation's own, where it has one"


def test_the_limits_of_episodes_are_the_runs_unless_the_command_says_otherwise(tmp_path: Path) -> None:
    run = run_of(tmp_path, tasks=[{"name": "calculator"}], rollout__turns={"max": 3, "env": ["MY_KEY"]})
    for tasks in ([], ["calculator"]):
        (own,) = plan_evaluations(run, tasks, [])
        (given,) = plan_evaluations(run, tasks, ["turns.env=[OTHER]", "rollout.turns.play_in=driver"])
        assert (own.settings.turns.max, own.settings.turns.env) == (3, ["MY_KEY"])
        turns = given.settings.turns
        assert (turns.max, turns.env, turns.play_in) == (3, ["OTHER"], "driver")
    (of_a_model,) = plan_evaluations(Path("nowhere"), ["calculator"], ["turns.env=[MY_KEY]"])
    assert (of_a_model.settings.turns.max, of_a_model.settings.turns.env) == (8, ["MY_KEY"])
    with pytest.raises(ConfigError, match=r"unknown key rollout.turns.envs; did you mean rollout.turns.env"):
        plan_evaluations(Path("nowhere"), ["calculator"], ["turns.envs=[X]"])
    with pytest.raises(ConfigError, match=r"got turns.max for add4, which is answered in one turn"):
        plan_evaluations(Path("nowhere"), ["arithmetic"], ["turns.max=2"])


def test_python_evaluates_a_run_within_its_own_limits_of_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, tasks=[{"name": "calculator"}], rollout__turns={"max": 3, "env": ["MY_KEY"]})
    monkeypatch.setattr(EvaluatedModel, "load", lambda *args: None)
    monkeypatch.setattr(PlannedEvaluation, "run", lambda self, *args, **more: SimpleNamespace(evaluation=self))
    own, given = sapo.evaluate(run).settings.turns, sapo.evaluate(run, turns=TurnsConfig(max=2)).settings.turns
    assert (own.max, own.env) == (3, ["MY_KEY"])
    assert (given.max, given.env) == (2, [])
    assert sapo.evaluate(tmp_path / "model", "calculator").settings.turns == TurnsConfig()


def test_a_problem_of_a_runs_task_has_the_runs_settings(tmp_path: Path) -> None:
    tasks = [
        {"name": "arithmetic", "digits": 2},
        {"name": "arithmetic", "digits": 3, "label": "hard", "prompt": {"template": "{prompt}?"}},
        {"name": "calculator"},
    ]
    run = run_of(tmp_path, tasks=tasks, rollout__max_new_tokens=9, rollout__turns={"max": 3})
    notes: list[str] = []

    def found(task: str, *overrides: str) -> tuple[str, int, int, str]:
        planned = plan_problem(run, task, overrides, 0, None, notes.append)
        settings = planned.settings
        return planned.task.name, settings.params.max_new_tokens, settings.turns.max, planned.prompt_format.template

    assert found("arithmetic") == found("add2") == ("add2", 9, 3, "{prompt}")
    assert found("arithmetic", "prompt.template=Q{prompt}") == ("add2", 9, 3, "Q{prompt}")
    assert found("hard") == ("hard", 9, 3, "{prompt}?")
    assert found("hard", "prompt.style=plain") == ("hard", 9, 3, "{prompt}?")
    assert found("calculator", "turns.max=2")[1:3] == (9, 2)
    assert notes == []
    assert found("hard", "digits=1") == ("add1", 64, 3, "{prompt}")
    assert "digits is a setting of the task" in notes[0]


def test_a_name_that_several_tasks_of_a_run_have_is_refused_with_theirs(tmp_path: Path) -> None:
    tasks = [{"name": "arithmetic", "digits": 1}, {"name": "arithmetic", "digits": 2}]
    run = run_of(tmp_path, tasks=tasks)
    with pytest.raises(ConfigError, match="got arithmetic, which are add1, add2; write one of these"):
        plan_problem(run, "arithmetic", [], 0)
    assert plan_problem(run, "add2", [], 0).task.name == "add2"


def test_a_task_is_found_by_its_label_and_evaluated_as_the_run_does(tmp_path: Path) -> None:
    tasks = [
        {"name": "arithmetic", "digits": 2},
        {"name": "arithmetic", "digits": 3, "label": "hard", "prompt": {"template": "{prompt}?"}},
        {"name": "calculator", "label": "sums"},
    ]
    run = run_of(tmp_path, tasks=tasks, rollout__max_new_tokens=9, rollout__turns={"max": 3}, eval__problems=7)

    def found(task: str, *overrides: str) -> tuple[str, int | None, int, int, str]:
        (planned,) = plan_evaluations(run, [task], list(overrides))
        settings = planned.settings
        drawn = settings.problems, settings.params.max_new_tokens, settings.turns.max
        return planned.task.name, *drawn, planned.prompt_format.template

    assert found("hard") == ("hard", 7, 9, 3, "{prompt}?")
    assert found("add2", "prompt.template=Q{prompt}") == ("add2", 7, 9, 3, "Q{prompt}")
    assert found("sums", "turns.max=2")[:4] == ("sums", 7, 9, 2)
    assert found("arithmetic", "digits=1")[:3] == ("add1", None, 64), "a kind is asked as it is without a run"
    several = plan_evaluations(run, ["hard", "sums"], ["turns.max=2"])
    assert [p.task.name for p in several] == ["hard", "sums"]
    for task, override, words in (
        ("hrd", [], r"got 'hrd'; did you mean 'hard'\?; the run has add2, hard, sums$"),
        ("hard", ["turns.max=2"], "got turns.max for hard, which is answered in one turn"),
        ("hard", ["digits=1"], "name its kind, arithmetic, with --task"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan_evaluations(run, [task], override)
    tasks[0] = {"name": "file", "path": str(tmp_path / "gone.jsonl"), "verifier": "last_number"}
    with pytest.raises(ConfigError, match=r"mean 'hard'\?; the run has file, hard, sums; its task file .*gone\.jsonl"):
        plan_evaluations(run_of(tmp_path / "b", tasks=tasks), ["hrd"], [])


def test_a_checkpoint_of_a_run_brings_the_run_s_tasks(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    checkpoint = run / "checkpoints" / "step-000002"
    write_model(checkpoint)
    (planned,) = plan_evaluations(checkpoint, [], [])
    assert planned.task.name == "prompts"
    subject = EvaluatedModel.load(checkpoint, device="cpu")
    directory, _ = output_directory(checkpoint, subject, planned, planned.ask(subject.policy), None, alone=True)
    assert directory == Path("evals/run-step-000002-prompts")


def test_a_model_that_is_no_run_needs_a_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run directory, so it has no tasks of its own; .* --task"):
        plan_evaluations(write_model(tmp_path / "model"), [], [])


def test_a_runs_own_precision_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, model__dtype="bfloat16")
    write_model(run / "checkpoints" / "step-000002")
    checkpoint = run / "checkpoints" / "step-000002"
    assert EvaluatedModel.load(checkpoint, device="cpu").about()["dtype"] == "bfloat16"
    assert EvaluatedModel.load(checkpoint, "float32", "cpu").about()["dtype"] == "float32"
    with pytest.raises(ConfigError, match="--dtype must be float32 or bfloat16; got 'int8'"):
        EvaluatedModel.load(checkpoint, "int8")


def test_the_fingerprint_is_of_the_weights_and_not_of_the_place(tmp_path: Path) -> None:
    names = {
        name: EvaluatedModel.load(write_model(tmp_path / name, seed=seed), device="cpu").weights
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert names["a"] == names["b"] != names["c"]


def test_the_place_is_free_or_holds_the_same_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model")
    subject = EvaluatedModel.load(model, device="cpu")
    small = {"problems": 2, "max_new_tokens": 4}
    (first,) = plan_evaluations(model, ["arithmetic"], ["digits=1"], samples=1, **small)
    (other,) = plan_evaluations(model, ["arithmetic"], ["digits=1"], samples=2, **small)
    first_asked, other_asked = first.ask(subject.policy), other.ask(subject.policy)
    assert output_directory(model, subject, first, first_asked, None, alone=True) == (Path("evals/model-add1"), None)
    first.run(subject, out="evals/model-add1")
    assert output_directory(model, subject, first, first_asked, None, alone=True) == (Path("evals/model-add1"), None)
    directory, note = output_directory(model, subject, other, other_asked, None, alone=True)
    assert directory == Path("evals/model-add1-2")
    assert note == (
        "evals/model-add1 holds another evaluation, with samples=1 where this one has 2; this one is written to "
        "evals/model-add1-2"
    )
    assert output_directory(model, subject, other, other_asked, Path("mine"), alone=True) == (Path("mine"), None)
    assert output_directory(model, subject, other, other_asked, Path("mine"), alone=False) == (Path("mine/add1"), None)
