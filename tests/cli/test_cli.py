"""The command line as a person meets it: real processes, one clear line for a mistake, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from sapo.cli import app
from sapo.config.recipes import RESUMABLE_KEYS
from sapo.data import Prompt
from sapo.model.policy import Policy
from sapo.rollout.prompting import PromptFormat
from support.commands import call
from support.kernels import fresh_cache
from support.runs import fingerprint, write_model, write_recipe
from support.zygote import run_forked


def sapo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAPO_CACHE": fresh_cache(cwd / "cache"), "COLUMNS": "120"}
    return run_forked(*arguments, cwd=cwd, env=environment)


def sapo_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cwd: Path, *arguments: str):
    """The same command in this process, several seconds sooner: exit code and the lines of standard error."""
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("SAPO_CACHE", str(cwd / "cache"))
    capsys.readouterr()
    return call(*arguments), capsys.readouterr().err.strip().splitlines()


def files_below(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def edit(recipe: Path, **changes: object) -> None:
    settings = yaml.safe_load(recipe.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = settings
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        place[last] = value
    recipe.write_text(yaml.safe_dump(settings))


def unknown_key(directory: Path, recipe: Path) -> None:
    edit(recipe, train__lerning_rate=1.0)


def negative_tau(directory: Path, recipe: Path) -> None:
    edit(recipe, objective={"name": "sapo", "tau_neg": -1})


def row_without_answer(directory: Path, recipe: Path) -> None:
    (directory / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "1+2=", "anwser": "3"}\n')


def existing_run(directory: Path, recipe: Path) -> None:
    (directory / "run").mkdir()
    (directory / "run" / "precious.txt").write_text("mine")


def run_directory_inside_a_file(directory: Path, recipe: Path) -> None:
    edit(recipe, run_dir=str(recipe / "run"))


def no_tokenizer(directory: Path, recipe: Path) -> None:
    for file in (directory / "model").glob("tokenizer*"):
        file.unlink()


def no_weights(directory: Path, recipe: Path) -> None:
    (directory / "model" / "model.safetensors").unlink()


def weights_cut_short(directory: Path, recipe: Path) -> None:
    file = directory / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def missing_model(directory: Path, recipe: Path) -> None:
    edit(recipe, model__path=str(directory / "nowhere"))


def missing_data(directory: Path, recipe: Path) -> None:
    (directory / "prompts.jsonl").unlink()


def missing_reward(directory: Path, recipe: Path) -> None:
    edit(recipe, tasks__0__verifier="rewards_of_a_test:share_of_eights")


def unknown_character(directory: Path, recipe: Path) -> None:
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "{c}?", "answer": "1"}}\n' for c in "abcdefghijkl"))


def prompt_too_long(directory: Path, recipe: Path) -> None:
    edit(recipe, rollout__max_new_tokens=64)


def no_cuda(directory: Path, recipe: Path) -> None:
    edit(recipe, device="cuda")


def graphs_without_cuda(directory: Path, recipe: Path) -> None:
    edit(recipe, device="cpu", rollout__cuda_graphs=True)


def graphs_perhaps(directory: Path, recipe: Path) -> None:
    edit(recipe, rollout__cuda_graphs="perhaps")


MISTAKES = [
    (unknown_key, ["unknown key train.lerning_rate", "did you mean train.learning_rate?"]),
    (negative_tau, ["tau_neg must be positive", "-1", "the paper uses 1.05"]),
    (row_without_answer, ["prompts.jsonl:3", "'answer'", "anwser"]),
    (existing_run, ["run exists already", "sapo resume", "run_dir=NAME"]),
    (run_directory_inside_a_file, ["recipe.yaml is not a directory", "choose another run_dir"]),
    (no_tokenizer, ["model has no tokenizer", "tokenizer.json"]),
    (no_weights, ["model has no weights"]),
    (weights_cut_short, ["model cannot be loaded"]),
    (missing_model, ["no model directory at", "nowhere"]),
    (missing_data, ["prompts.jsonl"]),
    (missing_reward, ["share_of_eights", "share_of_sevens"]),
    (unknown_character, ["the tokenizer cannot encode the prompt"]),
    (prompt_too_long, ["rollout.max_new_tokens must leave room for the prompt"]),
    (no_cuda, ["'cuda'", "use cpu or auto"]),
    (graphs_perhaps, ["cuda_graphs must be auto, true or false; got 'perhaps'"]),
    (graphs_without_cuda, ["rollout.cuda_graphs=true needs a CUDA device", "got device cpu", "auto leaves them out"]),
]


@pytest.mark.parametrize(("mistake", "parts"), MISTAKES, ids=[m.__name__ for m, _ in MISTAKES])
def test_a_mistake_gets_one_line_exit_code_2_and_nothing_is_written(
    mistake, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_recipe(tmp_path)
    mistake(tmp_path, recipe)
    before = files_below(tmp_path)
    code, lines = sapo_here(monkeypatch, capsys, tmp_path, "train", str(recipe))
    assert (code, len(lines)) == (2, 1), lines
    for part in parts:
        assert part in lines[0]
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train", "nowhere.yaml"), "no recipe file 'nowhere.yaml'"),
        (("compare", "."), ". is a directory, of neither a run nor a comparison; name a recipe's file"),
        (("train", "quikstart"), "did you mean quickstart?"),
        (("train", "quickstart", "objective.tau_neg=-1"), "tau_neg must be positive"),
        (("train", "quickstart", "steps=3"), "unknown key steps"),
        (("resume", "nowhere"), "no run directory at nowhere"),
        (("resume", "."), "has no config.yaml"),
        (("eval", "nowhere", "--task", "arithmetic"), "no model directory at nowhere"),
        (("eval", "nowhere", "--task", "aime25"), "no model directory at nowhere"),  # before the hub is asked for rows
        (("eval", "nowhere"), "no model directory at nowhere"),
        (("diagnose", "nowhere", "--task", "aime25"), "no model directory at nowhere"),
        (("eval", "no.gguf", "--task", "aime25"), "no GGUF file at no.gguf"),
        (("eval", "no/where", "--task", "arithmatic"), "did you mean 'arithmetic'?"),
        (("eval", "no/where", "--task", "arithmetic", "--k", "1,8"), "every k must lie in 1..samples (4)"),
        (("eval", "no/where", "--task", "arithmetic", "--top-p", "2"), "--top-p must lie in (0, 1]"),
        (("eval", "no/where", "--task", "arithmetic", "--k", "one"), "--k takes whole numbers between commas"),
        (("eval", "no/where", "--task", "arithmetic", "prompt.styl=chat"), "did you mean prompt.style?"),
        (("eval", "no/where"), "no/where is not a run directory, so it has no tasks of its own; name one with --task"),
        (("compare", "quickstart", "--seeds", "0"), "a comparison needs seeds, 1 or more of them; got 0"),
        (("compare", "quickstart", "--seeds", "some"), "--seeds takes numbers between commas, as in 3, or 0,1,2"),
        (("compare", "quickstart", "--learning-rates", ","), "--learning-rates takes numbers between commas"),
        (("compare", "quickstart", "--objectives", "sapo,grop"), "got 'grop'; did you mean 'grpo'?"),
        (("compare", "quickstart", "--jobs", "0"), "--jobs must be 1 or more; got 0"),
        (("compare", "quickstart", "train.learning_rate=1"), "use learning_rates (--learning-rates)"),
        (("compare", "quickstart", "--arms", "sapo"), "is a recipe of one run; use --objectives"),
        (("compare", "paper_fig5", "--objectives", "sapo"), "has arms; choose some by --arms"),
        (("train", "paper_fig5"), "`sapo compare paper_fig5` makes them"),
        (("eval-compare", "nowhere", "nowhere"), "no results at nowhere; `sapo eval` writes them"),
    ],
)
def test_other_mistakes_on_the_command_line_are_one_line_too(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, lines = sapo_here(monkeypatch, capsys, tmp_path, *arguments)
    assert (code, len(lines)) == (2, 1), lines
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = sapo("train", "quickstart", "objective.tau_neg=-1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "sapo: objective: tau_neg must be positive and finite; got -1; the paper uses 1.05"
    ]


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "import sapo.workflows.train, sapo.cli, sys; sapo.workflows.train.train = None; "
        "sys.argv = ['sapo', 'train', 'quickstart']\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + "sapo.cli.main()"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "TypeError" in result.stderr


def test_the_help_of_resume_lists_what_may_change() -> None:
    (overrides,) = (p for p in get_command(app).commands["resume"].params if p.name == "overrides")
    assert [key for key in RESUMABLE_KEYS if key not in overrides.help] == []


def test_a_finished_run_says_that_no_step_is_left(tmp_path: Path) -> None:
    assert sapo("train", str(write_recipe(tmp_path, train__steps=1, eval__every=0)), cwd=tmp_path).returncode == 0
    result = sapo("resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        "no step is left: the run has made its 1 step; to train on: sapo resume run train.steps=N, N above 1"
        in result.stdout
    )
    assert "Each step draws" not in result.stdout


def test_a_whole_run_resumes_evaluates_and_says_what_it_wrote(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    result = sapo("train", str(recipe), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Each step draws 4 completions of 4 prompts (16 sequences)" in result.stdout
    assert "log pi_old: the engine's, equal to the trainer's by the self-check" in result.stdout
    assert "held-out mean reward" in result.stdout, "the verifier's rewards are shares"
    assert "wrote " in result.stdout
    assert "\x1b" not in result.stdout, "no colours or cursor movements where there is no terminal"

    newest = tmp_path / "run" / "checkpoints" / "step-000006"
    whole = fingerprint(tmp_path / "run", 6)
    cut = newest / "optimizer.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    result = sapo("resume", str(tmp_path / "run"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: checkpoint not used" in result.stdout
    assert "step-000006/optimizer.safetensors holds" in result.stdout
    assert "resuming from" in result.stdout
    assert "step-000004" in result.stdout
    assert fingerprint(tmp_path / "run", 6) == whole
    assert "next: sapo eval " in result.stdout
    data = str(tmp_path / "prompts.jsonl")
    arguments = ["eval", str(tmp_path / "run"), "--task", data, "verifier=rewards_of_a_test:share_of_sevens"]
    arguments += ["--samples", "8", "--k", "1,4", "--max-new-tokens", "12"]
    result = sapo(*arguments, "--greedy", "--problems", "256", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "evals" / "run-prompts" / "results.json").read_text())
    assert written["schema"] == "sapo.evaluation/1"
    assert written["results"]["samples"] == 8
    assert {"mean@8", "pass@1", "pass@4", "majority@8", "greedy", "constant"} <= set(written["results"])
    assert written["results"]["greedy"] is not None
    assert "24 of 24 held-out problems; 256 were asked for" in result.stdout, "fewer than asked for are said aloud"
    assert "wrote evals/run-prompts/results.json" in result.stdout


def test_an_evaluation_encodes_its_prompts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    encoded: list[int] = []
    encode = PromptFormat.encode

    def counted(self: PromptFormat, policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
        encoded.append(len(prompts))
        return encode(self, policy, prompts)

    monkeypatch.setattr(PromptFormat, "encode", counted)
    arguments = ["eval", str(tmp_path / "model"), "--task", "arithmetic", "digits=2", "--problems", "8", "--samples=1"]
    code, _ = sapo_here(monkeypatch, capsys, tmp_path, *arguments, "--max-new-tokens", "4", "--no-constant")
    assert (code, encoded) == (0, [8])


def test_two_evaluations_are_kept_apart_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    evaluate = ["eval", str(tmp_path / "model"), "--task", "arithmetic", "digits=2", "--problems", "8"]
    evaluate += ["--max-new-tokens", "8"]

    def run(*arguments: str) -> tuple[int, list[str]]:
        return sapo_here(monkeypatch, capsys, tmp_path, *arguments)

    assert run(*evaluate) == (0, [])
    assert run(*evaluate, "--samples", "2") == (0, [])
    assert sorted(p.name for p in (tmp_path / "evals").iterdir()) == ["model-add2", "model-add2-2"]
    code, lines = run(*evaluate, "--samples", "2", "--out", "evals/model-add2")
    assert (code, len(lines)) == (2, 1), lines
    assert "evals/model-add2 holds another evaluation, with samples=4 where this one has 2" in lines[0]
    compare = ["eval-compare", "evals/model-add2", "evals/model-add2-2/results.json", "--out", "c.json"]
    assert run(*compare) == (0, [])
    assert json.loads((tmp_path / "c.json").read_text())["problems"] == 8
    code, lines = run(*compare)
    assert (code, lines) == (2, ["sapo: c.json exists already; name another file with --out"])


def test_a_cold_start_is_made_once_and_then_found(tmp_path: Path) -> None:
    overrides = [
        "model.coldstart.target=0",
        "model.coldstart.max_updates=3",
        "model.coldstart.hidden_size=16",
        "model.coldstart.examples=20",
        "model.coldstart.eval_problems=8",
        "tasks.0.digits=2",
    ]
    first = sapo("coldstart", "quickstart", *overrides, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-3].startswith("made: ")
    second = sapo("coldstart", "quickstart", *overrides, cwd=tmp_path)
    assert "in the cache: " in second.stdout
    other = sapo("coldstart", "quickstart", *overrides, "model.coldstart.seed=1", cwd=tmp_path)
    assert other.stdout.splitlines()[-3].startswith("made: ")
    assert len(list((tmp_path / "cache" / "coldstart").iterdir())) == 2


def test_a_cold_start_that_misses_its_target_fails_and_says_so(tmp_path: Path) -> None:
    overrides = ["model.coldstart.max_updates=2", "model.coldstart.examples=8", "model.coldstart.eval_problems=8"]
    result = sapo("train", "quickstart", *overrides, cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "the cold start reached pass@1 0.000 of 0.3 in 2 updates" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_help_says_what_an_option_is_that_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        app(["compare", "--help"], prog_name="sapo")
    assert "[default: (these three)]" in capsys.readouterr().out
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            # Help is markup: a word in brackets would be taken for a style and not be shown.
            assert "[" not in (getattr(parameter, "help", None) or ""), f"{name}: {parameter.name}"


def test_completions_are_shown_as_text_never_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from sapo.front.display import Display

    display = Display(Console(width=80))
    display.warning("[red]not a colour[/red] [link=file:///etc/passwd]x[/link]")
    assert "[red]not a colour[/red] [link=file:///etc/passwd]x[/link]" in capsys.readouterr().out.replace("\n", " ")


def test_the_tiny_model_of_the_tests_is_an_ordinary_directory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = write_model(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(directory).config.architectures == ["Qwen3ForCausalLM"]
    assert AutoTokenizer.from_pretrained(directory)("1+1=")["input_ids"] == [1, 10, 1, 14]


def test_a_name_between_colons_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from sapo.cli.terminal import errors, say

    say("module a:b:c")
    errors.print("module a:b:c", markup=False)
    assert [text.strip() for text in capsys.readouterr()] == ["module a:b:c", "module a:b:c"]


def test_a_page_of_laws_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss_of_a_test.py").write_text("def loss(logp_BT, *others):\n    return logp_BT.sum()\n")
    arguments = ("conformance", "loss_of_a_test:loss", "--markdown", "nowhere/laws.md")
    code, lines = sapo_here(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 2
    assert lines == ["sapo: --markdown nowhere/laws.md cannot be written: No such file or directory; name another file"]
