"""A dry run loads and checks everything, shows what the model would see, and writes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import sapo
from sapo.config.recipes import load_recipe
from sapo.config.summary import sampler_sentences
from sapo.errors import ConfigError
from sapo.workflows.coldstart import ensure_coldstart
from sapo.workflows.dry_run import DryRun
from sapo.workflows.train import dry_run
from support.runs import write_recipe
from support.zygote import run_forked


def files_below(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    return write_recipe(tmp_path, prompt={"template": "{prompt}", "stop": [";"]})


def test_the_prompts_shown_are_those_of_the_first_step(recipe: Path) -> None:
    shown = dry_run(load_recipe(recipe)).prompts
    sapo.train(load_recipe(recipe, ["train.steps=1", "log.rollouts_every=1"]))
    lines = (recipe.parent / "run" / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    first_samples = [r for r in map(json.loads, lines) if r["sample"] == 0]
    assert [list(p.token_ids) for p in shown] == [r["prompt_token_ids"] for r in first_samples[:2]]
    assert [p.text for p in shown] == [r["prompt"] for r in first_samples[:2]]
    assert all("".join(p.tokens) == p.text for p in shown)
    assert shown[0].stop == (";",)


def test_nothing_is_written(recipe: Path) -> None:
    before = files_below(recipe.parent)
    dry_run(load_recipe(recipe))
    assert files_below(recipe.parent) == before


def test_two_tasks_are_shown_one_prompt_each(recipe: Path) -> None:
    config = load_recipe(recipe)
    twice = [config.tasks[0].model_copy(update={"label": name}) for name in ("left", "right")]
    assert [p.task for p in dry_run(config.model_copy(update={"tasks": twice})).prompts] == ["left", "right"]


def test_special_tokens_are_shown(recipe: Path) -> None:
    from sapo.model.loading import load_policy

    policy = load_policy(recipe.parent / "model")
    policy.tokenizer.chat_template = "{% for m in messages %}<eos>{{ m['content'] }}{% endfor %}<eos>"
    policy.tokenizer.save_pretrained(recipe.parent / "model")
    shown = dry_run(load_recipe(recipe, ["prompt.style=chat"])).prompts[0]
    end = policy.tokenizer.eos_token_id
    assert shown.tokens[0] == shown.tokens[-1] == "<eos>"
    assert shown.token_ids[0] == shown.token_ids[-1] == end
    assert shown.text.startswith("<eos>")


def test_a_cold_start_that_is_not_made_yet_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    overrides = [f"run_dir={tmp_path / 'run'}", "threads=1"]
    seen = dry_run(load_recipe("quickstart", overrides))
    assert seen.coldstart_missing
    assert "76,544 parameters" in seen.model  # the quick start's model, by its README
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["model.lora={rank: 4}", "objective.kl={coefficient: 0.1}"])
def test_a_cold_start_that_is_not_made_yet_is_estimated_like_one_that_is(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model made is of the same shape, so that all parts are equal but what this process holds by chance."""
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    short = [f"model.coldstart.{key}" for key in ("target=0", "max_updates=1", "examples=8", "eval_problems=8")]
    config = load_recipe("quickstart", [f"run_dir={tmp_path / 'run'}", "threads=1", *short, change])
    before = dry_run(config)
    ensure_coldstart(config.model_copy(update={"threads": 1}))
    after = dry_run(config)
    assert (before.coldstart_missing, after.coldstart_missing) == (True, False)
    assert before.model == after.model

    def parts(seen: DryRun) -> dict:
        by_chance = ("interpreter and libraries", "held back by the allocator")
        return {ph: {k: v for k, v in p.items() if k not in by_chance} for ph, p in seen.memory.phases.items()}

    assert parts(before) == parts(after)
    part = "moments of AdamW" if "lora" in change else "weights of the reference"
    # two moments of the trained parameters alone, all of which a full fine-tuning trains; or as much as the weights
    full = parts(before)["checkpoint"]
    assert 0 < full[part] < 2 * full["weights"] if "lora" in change else full[part] == full["weights"]


def test_what_a_run_would_refuse_is_refused(recipe: Path) -> None:
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "mine").touch()
    with pytest.raises(ConfigError, match="exists already"):
        dry_run(load_recipe(recipe))
    with pytest.raises(ConfigError, match="must leave room for the prompt"):
        dry_run(load_recipe(recipe, [f"run_dir={recipe.parent / 'other'}", "rollout.max_new_tokens=64"]))


def test_a_dry_run_changes_nothing_in_the_run_that_follows(recipe: Path) -> None:
    from support.runs import metrics

    directories = [recipe.parent / name for name in ("plain", "after")]
    sapo.train(load_recipe(recipe, [f"run_dir={directories[0]}"]))
    dry_run(load_recipe(recipe, [f"run_dir={directories[1]}"]))
    sapo.train(load_recipe(recipe, [f"run_dir={directories[1]}"]))
    assert metrics(directories[0]) == metrics(directories[1])


E4M3 = "experiments.sampler_dtype=float8_e4m3fn"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], []),
        (
            ["rollout.staleness=8"],
            [
                "Every batch is 8 updates (2 steps) old at its first update; those of the run's start are younger.",
                "log pi_old is of the weights that sampled, the engine's own where the self-check finds it equal.",
            ],
        ),
        (
            ["rollout.staleness=1", "experiments.old_logprobs=current", "objective.tis={mode: sequence}"],
            [
                "Every batch is 1 update (0.25 steps) old at its first update; those of the run's start are younger.",
                "log pi_old is the trainer's, at the weights of the batch's first update: no ratio holds its age.",
                "Beside its gate each response is weighed by rho = prod pi_old / mu, at most 2.",
            ],
        ),
        (
            [E4M3, "experiments.sampler_scaling=none", "experiments.sampler_vectors=true", "train.old_logprobs=engine"],
            [
                "Completions are drawn from weights rounded to float8_e4m3fn (unscaled, norms and biases too); the "
                "trainer and evaluations keep the policy's own.",
                "log pi_old is the engine's, so that r holds its rounding as well as the drift.",
            ],
        ),
        (
            [E4M3, "experiments.sampler_switch={step: 101, dtype: null}", "objective.tis={mode: icepop}"],
            [
                "Completions are drawn from weights rounded to float8_e4m3fn (scaled by matrix, matrices only), from "
                "step 101 on from the policy's weights; the trainer and evaluations keep the policy's own.",
                "log pi_old is the trainer's, at the weights that sampled.",
                "Beside its gate each token is weighed by w = pi_old / mu, 0 outside 0.5..5.",
            ],
        ),
    ],
    ids=["plain", "stale", "current", "rounded", "switched_and_weighed"],
)
def test_a_sampler_that_is_not_the_policy_is_told_of_in_plain_sentences(overrides: list[str], said: list[str]) -> None:
    assert sampler_sentences(load_recipe("quickstart", overrides)) == said


def run_command(recipe: Path, *overrides: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    result = run_forked("train", str(recipe), *overrides, "--dry-run", cwd=recipe.parent, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_says_batches_prompts_and_memory(tmp_path: Path) -> None:
    said = run_command(write_recipe(tmp_path, rollout__staleness=2))
    assert "Each step draws 4 completions of 4 prompts (16 sequences)" in said
    assert "Every batch is 2 updates (1 step) old at its first update" in said
    assert "prompt 2 of the first step, as the model sees it:" in said
    assert "a completion ends with the end token" in said
    assert "estimated peak" in said
    assert "nothing was written" in said
    assert not (tmp_path / "run").exists()


def test_the_command_says_whose_memory_it_is_where_several_ranks_train(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    said = " ".join(run_command(recipe, "train.ranks=2").split())
    assert "each of 2 ranks keeps its slices of weights, gradients and optimizer state" in said
    assert "each of" not in run_command(recipe)
