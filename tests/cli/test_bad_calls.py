"""Calls that were answered late, half or not at all: one line, exit code 2, nothing written."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from sapo.cli.app import app
from sapo.config.recipes import load_recipe, resolve_recipe
from sapo.errors import ConfigError, TaskError
from sapo.tasks import make_task
from sapo.workflows.comparing import load_comparison
from support.pictures import encoded, noise
from support.report_cases import write_run
from support.runs import write_model, write_recipe
from trials.harness import call, everything


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))


def refused(*arguments: str) -> str:
    before = everything(Path.cwd())
    outcome = call(*arguments)
    assert outcome.refused, outcome
    assert everything(Path.cwd()) == before
    return outcome.lines


def test_conformance_answers_unknown_names_before_it_judges_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import sapo.conformance.report as report

    monkeypatch.setattr(report, "judge_family", lambda name: pytest.fail(f"{name} was judged first"))
    assert "got 'trll'; did you mean 'trl'?" in refused("conformance", "sapo", "trll")
    assert "got 'sapo' twice" in refused("conformance", "sapo", "sapo")
    assert "importing 'nowhere' failed" in refused("conformance", "sapo", "nowhere:f")
    assert "objective must be one of" in refused("conformance", "sapo", "--objective", "sapoo")
    assert "unknown" not in refused("conformance", "sapo", "--markdown", "/dev/null/x")


def test_each_arm_and_objective_is_named_once(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    assert "got 'sapo' 2 times" in refused("compare", recipe, "--objectives", "sapo,sapo")
    assert "takes names between commas" in refused("compare", recipe, "--objectives", ",")
    assert "got 'sapo' 2 times" in refused("compare", "paper_fig4", "--arms", "sapo,sapo")
    with pytest.raises(ConfigError, match="objectives must differ"):
        load_comparison(recipe, objectives=["sapo", "grpo", "sapo"])


def test_a_report_checks_where_its_images_go_before_it_writes_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    assert "--png must be a directory; got taken, a file" in refused("report", "run", "--png", "taken")
    assert "a link that leads nowhere" in refused("report", "run", "--out", "link")
    assert "cannot be written" in refused("report", "run", "--out", "/proc/x")


@pytest.mark.parametrize("option", ["--gpus", "--prompt-tokens", "--completion-tokens"])
@pytest.mark.parametrize("number", ["0", "-3"])
def test_a_plan_is_for_one_or_more(option: str, number: str) -> None:
    words = refused("plan", "qwen3_4b_sapo", option, number)
    assert words.strip() == f"sapo: Invalid value for '{option}': Input should be greater than or equal to 1"


def test_a_picture_that_the_command_line_names_is_left_out_there(tmp_path: Path) -> None:
    words = refused("generate", "nowhere", "What?", "--image", "gone.png")
    assert f"--image: there is no picture at {tmp_path / 'gone.png'}" in words
    assert words.strip().endswith("add the file or leave --image out")
    address = "https://example.com/a.png"
    words = refused("generate", "nowhere", "What?", "--image", address)
    assert f"--image: a picture must be a file; got the address '{address}'; download it first" in words
    frames = [noise(i) for i in range(2)]
    (tmp_path / "moving.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "got an animation of 2 frames; save one frame as a picture" in refused(
        "generate", "nowhere", "What?", "--image", "moving.gif"
    )


@pytest.mark.parametrize("command", ["train", "resume", "eval", "compare", "report", "export", "diagnose", "coldstart"])
@pytest.mark.parametrize("name", ["a" * 300, "loop", "dangling"])
def test_a_name_that_no_path_can_have_is_refused_by_every_command(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert name[:20] in refused(command, name, *(("out",) if command == "export" else ()))


def test_a_value_that_contains_itself_is_refused_in_a_recipe_and_on_the_command_line(tmp_path: Path) -> None:
    Path("recursive.yaml").write_text("a: &a [*a]\n")
    Path("bomb.yaml").write_text(
        "\n".join(["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
    )
    for recipe in ("recursive.yaml", "bomb.yaml"):
        assert "must not contain itself" in refused("train", recipe)
    assert "not valid YAML" in refused("train", str(write_recipe(tmp_path)), "seed=&a [*a]")


@pytest.mark.parametrize(
    "key",
    ["train.steps", "train.learning_rate", "rollout.temperature", "objective.tau_pos", "seed", "eval.k", "train.betas"],
)
def test_a_truth_value_is_no_number(key: str, tmp_path: Path) -> None:
    value = "[true, true]" if key in ("eval.k", "train.betas") else "true"
    with pytest.raises(ConfigError, match=f"{key.rpartition('.')[2]} must be a number; got true; write 1 or 0"):
        load_recipe(write_recipe(tmp_path), [f"{key}={value}"])


@pytest.mark.parametrize(
    "override",
    [
        *("train.learning_rate=1e308", "train.learning_rate=1e-320", "rollout.temperature=1e308"),
        *("rollout.temperature=1e-320", "train.steps=1e23", "eval.temperature=1e-9", "objective.tau_pos=1e308"),
        *("threads=100000", "eval.problems=1e12", "eval.seed=-1"),
    ],
)
def test_a_number_that_cannot_be_computed_with_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_recipe(write_recipe(tmp_path), [override])
    assert override.partition("=")[0].rpartition(".")[2] in str(refusal.value)


def test_a_cold_start_of_1e23_layers_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"coldstart\.layers"):
        load_recipe("quickstart", ["model.coldstart.layers=1e23"])


def test_a_number_in_scientific_notation_is_one_in_every_place_of_a_recipe(tmp_path: Path) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    recipe["objective"] = {"name": "grpo", "eps_low": "EPS", "eps_high": "EPS"}
    recipe["tasks"][0]["held_out_fraction"] = "SHARE"
    text = json.dumps(recipe).replace('"EPS"', "3e-4").replace('"SHARE"', "2e-1")
    (tmp_path / "exponents.yaml").write_text(text)
    config = load_recipe(tmp_path / "exponents.yaml")
    assert config.objective.hyperparameters["eps_low"] == 3e-4
    assert config.tasks[0].options["held_out_fraction"] == 0.2


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"digits": True}, "digits must be a whole number"),
        ({"digits": 10**30}, "of at most 1e9"),
        ({"name": 7}, "name must be a text"),
    ],
)
def test_an_option_of_a_task_has_the_type_that_it_declares(options: dict, rule: str) -> None:
    with pytest.raises(TaskError, match=rule):
        make_task("arithmetic", seed=0, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quiet"], "--dry-run prints tables; got --quiet with it"),
        (["--json"], "--dry-run prints tables; got --json with it"),
        (["--quiet", "--json"], "got both; leave one out"),
    ],
)
def test_a_dry_run_is_neither_quiet_nor_json(options: list[str], words: str) -> None:
    # Before the recipe is read: there is none of this name.
    assert words in refused("train", "no_recipe", "--dry-run", *options)


def test_every_whole_number_of_the_command_line_has_bounds_or_is_checked_by_its_command() -> None:
    checked = {("compare", "jobs"), ("evaluate", "seed"), ("diagnose", "seed"), ("plan", "node")}
    for command in app.registered_commands:
        assert command.callback is not None
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            annotated = get_args(parameter.annotation)
            if not annotated or int not in (annotated[0], *get_args(annotated[0])):
                continue
            option, key = annotated[1], (command.callback.__name__, name)
            assert key in checked or None not in (option.min, option.max), key


@pytest.mark.parametrize(
    "call",
    [
        ("generate", "model", "1+1=", "--samples"),
        ("plan", "quickstart", "--prompt-tokens"),
        ("serve", "model", "--at-once"),
        ("serve", "model", "--max-new-tokens"),
        ("chat", "model", "--seed"),
        ("eval", "model", "--task", "arithmetic", "--out", "new", "--seed"),
        ("diagnose", "model", "--task", "arithmetic", "--seed"),
        ("plan", "quickstart", "--node"),
    ],
    ids=" ".join,
)
def test_a_number_of_forty_digits_is_refused(call: tuple[str, ...], tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    refused(*call, "9" * 40)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 9\n", "the key 'train' stands twice"),
        ("extra: {a: 1, a: 2}\n", "the key 'a' stands twice"),
        ("null: 3\n", "a key must be a text; got"),
        ("2026-01-01: 3\n", "a key must be a text; got"),
    ],
)
def test_a_key_of_a_recipe_is_a_text_and_stands_once(text: str, words: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + text)
    assert words in refused("train", str(recipe), "--dry-run")


def test_a_value_of_a_recipe_is_one_of_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a value must be one of YAML; got Value 'function'"):
        resolve_recipe({"tasks": [{"name": "arithmetic", "digits": lambda: 1}]}, [], "recipe")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("device=mps", "device must be auto, cpu, cuda or cuda:N; got 'mps'"),
        ("device=meta", "device must be auto, cpu, cuda or cuda:N; got 'meta'"),
        ("rollout.turns.env=['A=B']", "turns.env must hold names of environment variables; got 'A=B'"),
        ("rollout.turns.env=['']", "turns.env must hold names of environment variables; got ''"),
        ("train={steps: 1, steps: 2}", "the value of train is not valid YAML"),
    ],
)
def test_a_device_a_variable_or_a_mapping_that_there_is_not_is_refused(
    override: str, words: str, tmp_path: Path
) -> None:
    assert words in refused("train", str(write_recipe(tmp_path)), "--dry-run", override)
