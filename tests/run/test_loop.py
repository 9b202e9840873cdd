"""The loop, run in process on an untrained model with a dense reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sapo
from sapo.config.diagnostics import WarningsConfig
from sapo.data import Status
from sapo.errors import ConfigError, NonFiniteError
from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.rollout.local.engine import LocalEngine
from sapo.run.models import load_model
from sapo.training.checkpoint import list_checkpoints
from sapo.training.packer import Packer
from sapo.training.trainer import Trainer
from sapo.workflows.export import export_model
from sapo.workflows.train import resume
from support.kernels import fresh_cache
from support.loop_cases import Recorder, run_recipe
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_recipe

FAITHFUL = WarningsConfig().unfaithful


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(run_recipe, tmp_path_factory)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)  # the user's reward function is imported from there
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))


def test_a_run_leaves_what_it_says_behind(whole: Callable[..., Path]) -> None:
    run = whole()
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "rollouts", "checkpoints"} <= names
    kinds = [m["kind"] for m in metrics(run)]
    assert kinds == (
        ["eval", "self_check"]
        + ["update", "distribution", "update", "distribution", "step"]
        + ["update", "update", "step"] * 2
        + ["eval"]
        + ["update", "update", "step"] * 3
        + ["eval"]
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["old_logprobs"] == "engine"
    assert summary["start"]["pass@1"] == metrics(run)[0]["pass@1"]
    assert summary["final"] == {
        k: v for k, v in metrics(run)[-1].items() if k not in ("kind", "step", "correct", "rewards")
    }
    assert summary["tokens"]["generated"] == sum(m["tokens/generated"] for m in metrics(run) if m["kind"] == "step")
    phases = set(summary["seconds"]) - {"total"}
    assert {"generate", "score", "update", "evaluate", "checkpoint"} <= phases
    assert [c.label for c in list_checkpoints(run / "checkpoints")] == ["step 6", "step 4"]


def test_the_reward_goes_up(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, train__steps=40, train__learning_rate=3e-3, eval__every=0, checkpoint__every=0)
    rewards = [m["reward/mean"] for m in metrics(run) if m["kind"] == "step"]
    # 16 completions a step: the mean of five steps has a standard error near .01 at the start.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_the_same_seed_twice_is_the_same_run_and_another_seed_is_not(
    tmp_path: Path, whole: Callable[..., Path]
) -> None:
    a = whole()
    b = run_recipe(tmp_path / "b")
    c = run_recipe(tmp_path / "c", seed=1)
    assert fingerprint(a, 6) == fingerprint(b, 6)
    assert metrics(a) != metrics(c)


def test_a_written_config_repeats_the_run(tmp_path: Path, whole: Callable[..., Path]) -> None:
    first = whole()
    again = sapo.train(sapo.load_recipe(first / "config.yaml", [f"run_dir={tmp_path}/again"])).directory
    assert fingerprint(first, 6) == fingerprint(again, 6)


def test_log_pi_old_is_recomputed_when_the_self_check_finds_it_rounded(tmp_path: Path) -> None:
    # bfloat16 keeps 8 bits: decoding and the packed pass round differently, by far more than this
    run = run_recipe(tmp_path, model__dtype="bfloat16", train__self_check_tolerance=1e-6)
    check = next(m for m in metrics(run) if m["kind"] == "self_check")
    assert check["log_ratio/max_abs"] > 1e-6
    assert (check["equal"], check["old_logprobs"]) == (False, "trainer")
    first_updates = [m for m in metrics(run) if m["kind"] == "update" and m["update"] == 0]
    assert all(m["ratio/abs_dev"] < 1e-3 for m in first_updates)


def test_the_guard_looks_at_the_first_update_that_moved_anything(tmp_path: Path, monkeypatch) -> None:
    _perturb_engine(monkeypatch)
    original = Packer.pack

    def first_is_empty(self, groups, include_all=False):
        packed = original(self, groups, include_all)
        return replace(packed, of_rank=((),)) if not include_all and groups[0].prompt.id % 4 == 0 else packed

    monkeypatch.setattr(Packer, "pack", first_is_empty)
    listener = Recorder()
    run = run_recipe(tmp_path, listener, train__old_logprobs="engine")
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert all(m["updates/skipped"] == 1 and m["first_update/ratio/abs_dev"] > FAITHFUL for m in steps)
    assert sum(m["kind"] == "warning" for m in metrics(run)) >= len(steps)


def test_an_existing_run_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = run_recipe(tmp_path)
    before = fingerprint(run, 6)
    with pytest.raises(ConfigError, match="exists already"):
        run_recipe(tmp_path)
    assert fingerprint(run, 6) == before


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    class Intruder(Recorder):
        message = ""

        def record(self, record: dict) -> None:
            if record["kind"] == "step" and not self.message:
                with pytest.raises(ConfigError) as caught:
                    resume(tmp_path / "run")
                self.message = str(caught.value)

    listener = Intruder()
    run_recipe(tmp_path, listener=listener)
    assert "another process is writing" in listener.message


def test_a_nonfinite_update_stops_the_run_with_step_cause_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.update

    def poisoned(self, *args, **kwargs):
        if self.updates == 6:
            with torch.no_grad():
                self.policy.head_weight[0, 0] = float("nan")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "update", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        run_recipe(tmp_path)
    message = str(caught.value)
    assert message.startswith("step 4, update 0: log pi of the policy is not finite")
    assert "goes on from step 2" in message


def test_an_unfaithful_sampler_is_found_by_the_self_check_and_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _perturb_engine(monkeypatch)
    listener = Recorder()
    run = run_recipe(tmp_path, listener)
    check = next(m for m in metrics(run) if m["kind"] == "self_check")
    assert (check["equal"], check["old_logprobs"]) == (False, "trainer")
    first_updates = [m for m in metrics(run) if m["kind"] == "update" and m["update"] == 0]
    assert all(m["ratio/abs_dev"] < 1e-5 for m in first_updates), "recomputed at the weights that sampled: r = 1"
    assert ["differ from the trainer's by up to 0.05 nats" in w for w in listener.warnings] == [True]


def test_an_unfaithful_log_pi_old_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _perturb_engine(monkeypatch)
    listener = Recorder()
    run = run_recipe(tmp_path, listener, train__old_logprobs="engine")
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert all(m["first_update/ratio/abs_dev"] > FAITHFUL for m in steps)
    assert sum("mean |r - 1| of the first update" in w for w in listener.warnings) == len(steps)


def _perturb_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose log-probabilities are off by five hundredths, as another precision's would be."""
    generate = LocalEngine.generate

    def perturbed(self, *args, **kwargs):
        return [
            tuple(replace(c, logprobs=c.logprobs - 0.05) for c in group) for group in generate(self, *args, **kwargs)
        ]

    monkeypatch.setattr(LocalEngine, "generate", perturbed)


def test_truncated_tails_of_the_distribution_are_never_taken_for_the_policys(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, rollout__top_p=0.8)
    check = next(m for m in metrics(run) if m["kind"] == "self_check")
    assert check["old_logprobs"] == "trainer"


def test_logged_rollouts_tell_each_token_and_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    run = run_recipe(tmp_path)
    rows = [json.loads(line) for line in (run / "rollouts" / "step-000002.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    updates = [m for m in metrics(run) if m["kind"] == "update" and m["step"] == 2]
    for update in updates:
        own = [r for r in rows if r.get("update") == update["update"]]
        ratios = torch.tensor([z for r in own for z in r["log_ratio"]], dtype=torch.float64).exp()
        assert (ratios - 1).abs().mean().item() == pytest.approx(update["ratio/abs_dev"])
        for row in own:  # with r = 1 in the first update, log pi of the second is not known here
            assert len(row["log_ratio"]) == len(row["token_ids"])
            gates = torch.tensor(row["gate_weight"], dtype=torch.float64)
            tau = 1.0 if row["advantage"] > 0 else 1.05
            drift = torch.tensor(row["log_ratio"], dtype=torch.float64).exp() - 1
            torch.testing.assert_close(gates, 1 / torch.cosh(tau * drift / 2) ** 2)
        weights = [w for r in own for w in r["gate_weight"]]
        assert sum(weights) / len(weights) == pytest.approx(update["gate/eur"])
        entropies = [e for r in own for e in r["entropy"]]
        assert len(entropies) == len(weights)
        assert sum(entropies) / len(entropies) == pytest.approx(update["entropy"])
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["old_logprobs"])
        assert row["reward"] == pytest.approx(row["text"].count("7") / 8)
        measured = "gate_weight" in row
        assert measured == (
            row["advantage"] != 0.0 or any(r["advantage"] != 0.0 for r in rows if r["prompt_id"] == row["prompt_id"])
        )


def test_statuses_are_counted_apart_from_wrong_answers(tmp_path: Path) -> None:
    tmp_path.joinpath("rewards_of_errors.py").write_text(
        "def judge(completion):\n    if '7' in completion:\n        raise RuntimeError('no sevens')\n    return 0.5\n"
    )
    file = write_recipe(tmp_path)
    config = sapo.load_recipe(file, ["tasks.0.verifier=rewards_of_errors:judge", "tasks.0.score_truncated=false"])
    run = sapo.train(config).directory
    for step in (m for m in metrics(run) if m["kind"] == "step"):
        counts = {s: step.get(f"status/{s.value}", 0) for s in Status}  # errors of environments where there are some
        assert sum(counts.values()) == 16
        assert counts[Status.TRUNCATED] > 0
    total_errors = sum(m["status/verifier_error"] for m in metrics(run) if m["kind"] == "step")
    assert total_errors > 0


def test_tensorboard_holds_the_figures_of_the_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_recipe(tmp_path, log__tensorboard=True)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = {e.step: e.value for e in events.Scalars("train/reward/mean")}
    expected = {m["step"]: m["reward/mean"] for m in metrics(run) if m["kind"] == "step"}
    assert logged == pytest.approx(expected)
    assert "eval/pass@1" in events.Tags()["scalars"]


def test_two_tasks_share_every_minibatch_and_are_logged_apart(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    settings = sapo.load_recipe(file).model_dump(mode="json")
    other = {**settings["tasks"][0], "label": "other", "weight": 3.0}
    settings["tasks"] = [settings["tasks"][0], other]
    settings["rollout"]["prompts_per_step"] = 8
    (tmp_path / "two.yaml").write_text(json.dumps(settings))
    run = sapo.train(sapo.load_recipe(tmp_path / "two.yaml")).directory
    for step in (m for m in metrics(run) if m["kind"] == "step"):
        assert (step["task/prompts/groups"], step["task/other/groups"]) == (2, 6)
    files = (run / "rollouts").iterdir()
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    by_update = {(r["update"], r["task"]) for r in rows if "update" in r}
    assert by_update == {(u, t) for u in (0, 1) for t in ("prompts", "other")}


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["frozen copy", "adapter off"])
def test_the_penalty_begins_at_zero_and_holds_the_policy_back(tmp_path: Path, lora: dict | None) -> None:
    def run(name: str, coefficient: float) -> list[float]:
        kl = {"coefficient": coefficient, "estimator": "k2"}
        directory = run_recipe(
            tmp_path / name, model__lora=lora, objective={"name": "sapo", "kl": kl}, train__learning_rate=1e-2
        )
        return [m["kl"] for m in metrics(directory) if m["kind"] == "update"]

    free, held = run("free", 1e-9), run("held", 100.0)
    # The first update is at the reference itself: what is left is rounding of the engine's forward.
    assert max(free[0], held[0]) < 1e-9
    assert sum(held[-4:]) < 0.5 * sum(free[-4:])


def test_an_adapter_is_checkpointed_alone_and_can_be_trained_further(tmp_path: Path) -> None:
    first = run_recipe(tmp_path / "first", model__lora={"rank": 2})
    checkpoint = first / "checkpoints" / "step-000006"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 40_000
    assert not (checkpoint / "model.safetensors").exists()
    further = run_recipe(tmp_path / "further", model__path=str(checkpoint), train__steps=2)
    assert metrics(further)[0]["reward/mean"] == pytest.approx(metrics(first)[-1]["reward/mean"], abs=1e-6)
    with pytest.raises(ConfigError, match="is an adapter already"):
        run_recipe(tmp_path / "twice", model__path=str(checkpoint), model__lora={"rank": 2})


def test_a_reference_with_other_tokens_is_refused(tmp_path: Path) -> None:
    other = character_tokenizer("abc")
    model = tiny_model("qwen3", len(other), seed=0, eos_token_id=other.eos_token_id, pad_token_id=other.pad_token_id)
    prepare_policy(model, other).save(tmp_path / "other")
    kl = {"coefficient": 0.1, "reference": str(tmp_path / "other")}
    with pytest.raises(
        ConfigError, match=r"must have the tokens of the trained model; .*/other has 5 and the model 19"
    ):
        run_recipe(tmp_path / "x", objective={"name": "sapo", "kl": kl})
    assert not (tmp_path / "x" / "run").exists()


def test_a_model_with_code_of_its_own_can_be_resumed_evaluated_and_exported(tmp_path: Path) -> None:
    recipe_directory = tmp_path / "own"
    recipe_directory.mkdir()
    recipe = write_recipe(recipe_directory, model__trust_remote_code=True, train__steps=2, checkpoint__every=1)
    config_file = recipe_directory / "model" / "config.json"
    config = json.loads(config_file.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config_file.write_text(json.dumps(config))
    (recipe_directory / "model" / "modeling_own.py").write_text(
        "from transformers import Qwen3ForCausalLM\n\n\nclass OwnForCausalLM(Qwen3ForCausalLM):\n    pass\n"
    )
    run = sapo.train(sapo.load_recipe(recipe)).directory
    assert resume(run, ["train.steps=3"]).summary["steps"] == 3
    policy, found = load_model(run)
    assert found == run / "checkpoints" / "step-000003"
    assert policy.num_parameters > 0
    export_model(run, tmp_path / "exported")
