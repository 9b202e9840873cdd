"""A plan counts what the code keeps, without making any of it, and proposes what makes it fit."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sapo.config.recipes import load_recipe
from sapo.data import Prompt
from sapo.errors import ConfigError
from sapo.model.adapters import add_adapter
from sapo.model.loading import load_policy
from sapo.training.batch import cut_groups, pack
from sapo.workflows.activations import Counts, full_length_group, measure_activations
from sapo.workflows.planning.machine import Machine
from sapo.workflows.planning.plan import Plan, make_plan
from sapo.workflows.planning.proposal import _narrow, propose
from sapo.workflows.planning.seconds import logprob_passes
from sapo.workflows.planning.shape import Parameter, shape_of
from sapo.workflows.train import dry_run
from support.runs import write_model, write_recipe
from support.zygote import run_forked

GIB = 2**30


def plan_of(*overrides: str, recipe: str = "qwen3_30b_a3b_sapo", machine: Machine | None = None) -> Plan:
    return make_plan(load_recipe(recipe, list(overrides)), machine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "llama", "mistral", "qwen3_5"])
def test_activations_counted_without_memory_are_those_of_the_model(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "other", architecture, layers=4, tie_embeddings=False)
    recipe = load_recipe(
        write_recipe(tmp_path, model={"path": str(tmp_path / "other"), "dtype": dtype}), ["device=cpu"]
    )
    policy, shape = load_policy(tmp_path / "other", dtype), shape_of(recipe)
    # Measured on the model itself, on a CPU; two of its four layers were counted.
    for counted, checkpointing in ((shape.kept, False), (shape.checkpointed, True)):
        measured = measure_activations(policy, checkpointing)
        size = Counts(
            tokens=1000,
            queries=1200,
            keys=4000,
            pairs=60_000,
            masks=60_000,
            scanned=2000 if architecture == "qwen3_5" else 0,
        )
        assert counted.bytes(size) == pytest.approx(measured.bytes(size), rel=0.01)
        assert measure_activations(policy, checkpointing).bytes(size) == measured.bytes(size), "as before, each time"
    assert shape.elements == policy.num_parameters


def test_an_adapter_is_counted_beside_frozen_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = write_recipe(tmp_path, model={"path": str(tmp_path / "model"), "lora": {"rank": 4, "alpha": 8}})
    shape, policy = shape_of(load_recipe(file, ["device=cpu"])), load_policy(tmp_path / "model")
    add_adapter(policy, rank=4, alpha=8, targets="all-linear", seed=0)
    assert sum(p.elements for p in shape.parameters if p.trained) == sum(p.numel() for p in policy.parameters())
    assert shape.elements == policy.num_parameters
    assert shape.kept.per_token == pytest.approx(measure_activations(policy).per_token, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 3, 8, 200])
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_a_rank_keeps_the_rows_that_torch_chunk_gives_it(rows: int, ranks: int) -> None:
    most = max(len(part) for part in torch.arange(rows).chunk(ranks))  # what FSDP2 shards with
    assert Parameter(rows, 5, 4, True, 0.0).slice_elements(ranks) == most * 5


def test_the_plan_of_one_process_is_that_of_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write_recipe(tmp_path)
    seen = dry_run(load_recipe(file, ["device=cpu"]))
    (length,) = {len(p.token_ids) for p in seen.prompts}
    planned = make_plan(load_recipe(file, ["device=cpu"]), prompt_tokens=length).memory.driver.phases
    for phase, names in {
        "update, forward": {"activations": 0.02, "gradient of the head": 0.0, "one chunk of logits": 0.0},
        "generate": {"weights": 0.0, "weights arranged for decoding": 0.0, "tables of the rows": 0.0},
    }.items():
        for name, tolerance in names.items():
            measured = seen.memory.phases[phase].get(name, 0)
            assert planned[phase].get(name, 0) == pytest.approx(measured, rel=tolerance), name


def test_a_plan_for_gpus_counts_the_precision_of_a_run_there(tmp_path: Path) -> None:
    """By hand: a weight takes 2 bytes in bfloat16 and 4 in float32, in which adapters stay."""
    write_model(tmp_path / "model")

    def weight_bytes(**changes: Any) -> tuple[float, bool]:
        plan = make_plan(load_recipe(write_recipe(tmp_path, **changes)))
        proposes = any("model.dtype" in change for change in _narrow(plan))
        return plan.shape.weight_bytes, proposes

    whole = weight_bytes(device="cuda", model__dtype="float32")
    assert whole == weight_bytes(device="cpu") == (whole[0], True)
    assert weight_bytes(device="cuda") == weight_bytes(device="auto") == (whole[0] / 2, False)
    assert weight_bytes(device="cuda", model__lora={"rank": 2})[1], "in float32, unless the recipe says otherwise"


def test_a_model_of_235_billion_parameters_takes_no_memory_to_plan() -> None:
    gc.collect()
    before = psutil.Process().memory_info().rss
    made = plan_of("model.path=Qwen/Qwen3-235B-A22B", "train.ranks=128")
    assert made.shape.elements / 1e9 == pytest.approx(235.09, abs=0.01)
    assert psutil.Process().memory_info().rss - before < GIB  # its weights would be 438 GiB


def test_micro_batches_are_counted_as_they_are_packed() -> None:
    groups = [full_length_group(Prompt(i, "t", "", (i, 1, 2)), 3, 5) for i in range(7)]
    for tokens in (1, 8, 20, 33, 1000):
        packed = pack(
            groups, normalizer="sequence_mean", tokens_per_microbatch=tokens, max_new_tokens=5, include_all=True
        ).microbatches
        cut = cut_groups(groups, tokens)
        assert len(cut) == len(packed)
        assert [sum(len(g.completions) for g in part) for part in cut] == [b.num_sequences for b in packed]


def test_sliced_parts_by_hand() -> None:
    # 30,532,122,624 parameters, of which no dimension but that of the experts (128) is cut unevenly by 64.
    made = plan_of("train.ranks=64")
    assert made.memory.other is not None
    parts = made.memory.other.phases["update, end"]
    assert parts["slices of weights"] == pytest.approx(4 * 30_532_122_624 / 64, rel=1e-3)
    assert parts["slices of the optimizer's state"] == 2 * parts["slices of weights"]
    assert parts["slices of gradients"] == parts["slices of weights"]
    assert made.memory.driver.phases["sync"]["driver's whole copy of the weights"] == 2 * 30_532_122_624
    # Beyond 128 ranks experts are cut no further: 128 rows have no more slices.
    more = [plan_of(f"train.ranks={n}").memory.driver.phases["sync"]["slices of weights"] for n in (128, 256)]
    assert more[1] > 0.94 * more[0]


def test_replicas_hold_more_and_context_groups_less() -> None:
    whole = plan_of("train.ranks=16").memory.other
    replicas = plan_of("train.ranks=16", "train.replicas=2").memory.other
    shared = plan_of("train.ranks=16", "train.context_parallel=4").memory.other
    assert whole is not None
    assert replicas is not None
    assert shared is not None
    update = "update, backward"
    assert replicas.phases[update]["slices of weights"] == 2 * whole.phases[update]["slices of weights"]
    assert shared.phases[update]["activations"] == pytest.approx(whole.phases[update]["activations"] / 4, rel=0.01)


def test_ranks_without_a_group_are_counted() -> None:
    # 256 prompts in four mini-batches: 64 groups for 128 ranks.
    assert plan_of("train.ranks=128").idle_ranks == 64
    assert plan_of("train.ranks=128", "train.context_parallel=2").idle_ranks == 0
    assert plan_of("train.ranks=64").idle_ranks == 0


def test_rates_change_seconds_as_they_should() -> None:
    def update(**rates: Any) -> Any:
        return plan_of("train.ranks=16", machine=Machine(**rates)).seconds["update"]

    usual = update()
    assert update(moe_mfu=0.4).compute == pytest.approx(usual.compute / 2, rel=0.01)
    assert update(network=100.0).transfer == pytest.approx(usual.transfer / 2, rel=0.01)
    assert update(node=16).transfer == pytest.approx(usual.transfer / 9, rel=0.05)  # 450 GB/s in place of 50
    # All bytes of the weights in bfloat16 gathered over 50 GB/s, once: 61.06 GB x 15/16 / 50, and copied at 4,800 GB/s.
    sync = plan_of("train.ranks=16").seconds["sync"].transfer
    assert sync == pytest.approx(61.06 * 15 / 16 / 50 + 61.06 / 4800, rel=0.001)


def test_shorter_completions_change_seconds_and_not_memory() -> None:
    config = load_recipe("qwen3_4b_sapo", ["train.ranks=8"])
    full, mean = make_plan(config), make_plan(config, completion_tokens=4096)
    assert mean.memory == full.memory
    assert mean.seconds["update"].compute < full.seconds["update"].compute / 8
    with pytest.raises(ConfigError, match=r"--completion-tokens must lie in 1\.\.32768.*got 99999"):
        make_plan(config, completion_tokens=99_999)


def test_passes_for_logprobs_are_those_a_run_would_make() -> None:
    def passes(*overrides: str) -> int:
        return logprob_passes(load_recipe("quickstart", list(overrides)))

    assert passes() == 0  # float32 and the local engine: its own serve
    assert passes("train.old_logprobs=trainer") == 1
    assert passes("rollout.top_p=0.9") == 1
    assert passes("model.dtype=bfloat16", "objective.kl.coefficient=0.1") == 2


@pytest.mark.parametrize(
    ("overrides", "machine"),
    [
        (["train.ranks=64", "rollout.max_rows=256"], {}),  # a cache that is too large
        (["train.ranks=64", "train.activation_checkpointing=false"], {}),
        (["train.ranks=64", "train.tokens_per_microbatch=1000000"], {}),
        (["train.ranks=64", "train.replicas=64"], {}),
        (["train.ranks=4", "model.path=Qwen/Qwen3-4B", "rollout.max_rows=64"], {"gpu_memory": 100.0}),
    ],
)
def test_what_is_proposed_makes_it_fit(overrides: list[str], machine: dict[str, float]) -> None:
    assumed = Machine(**machine)
    made = plan_of(*overrides, machine=assumed)
    assert not made.fits
    assert made.first_too_large() is not None
    proposal = propose(made)
    assert proposal is not None
    assert proposal.remaining is None
    assert plan_of(*overrides, *proposal.overrides.split(), machine=assumed).fits
    # Nothing of it is needless.
    for key in proposal.changes:
        fewer = [word for word in proposal.overrides.split() if not word.startswith(f"{key}=")]
        assert not plan_of(*overrides, *fewer, machine=assumed).fits


def test_where_no_setting_helps_that_is_said() -> None:
    proposal = propose(plan_of("model.path=Qwen/Qwen3-235B-A22B", "train.ranks=64"))
    assert proposal is not None
    assert proposal.remaining is not None
    assert "driver's whole copy of the weights (437.9 GiB)" in proposal.remaining


def test_a_plan_that_fits_has_no_proposal() -> None:
    assert propose(plan_of("train.ranks=64")) is None


def test_vllm_takes_its_share_of_the_drivers_gpu() -> None:
    made = plan_of("train.ranks=8", "rollout.engine=vllm", "rollout.vllm.gpu_memory_utilization=0.6")
    parts = made.memory.driver.phases["generate"]
    assert parts["engine's weights"] + parts["engine's cache and workspace"] == int(0.6 * 140 * GIB)
    assert "engine's weights" not in made.memory.driver.phases["update, end"]  # it sleeps


@pytest.mark.parametrize(
    "there",
    [["rollout.engine=vllm", "rollout.servers=2"], ["cluster.kind=ray", "cluster.trainers=8", "cluster.engines=2"]],
)
def test_servers_and_engines_of_a_cluster_take_nothing_of_the_drivers_gpu(there: list[str]) -> None:
    here, beside = plan_of("train.ranks=8"), plan_of("train.ranks=8", *there)
    assert beside.memory.driver.phases["generate"].keys() == here.memory.driver.phases["sync"].keys() - {
        "transfer: one whole parameter and its pieces"
    }  # what a rank holds all the time
    assert beside.memory.driver.phases["update, end"] == here.memory.driver.phases["update, end"]
    assert any("not counted here" in sentence for sentence in beside.assumptions())
    proposal = propose(plan_of("train.ranks=8", *there, machine=Machine(gpu_memory=40)))
    assert proposal is not None
    assert not {key for key in proposal.changes if key.startswith("rollout.")}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return run_forked("plan", *words, cwd=Path.cwd(), env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_command_prints_what_the_library_computes() -> None:
    ran = command("qwen3_30b_a3b_sapo", "--gpus", "64", "--json")
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    made = plan_of("train.ranks=64")
    assert answer["needed"] == made.needed
    assert answer["fits"] is True
    assert answer["proposal"] is None
    assert answer["machine"] == dataclasses.asdict(Machine())
    told = command("qwen3_30b_a3b_sapo", "--gpus", "8", "--gpu-memory", "80")
    assert "it does not fit: driver, generate: with driver's whole copy of the weights" in told.stdout
    assert "20%" in told.stdout  # the rates are printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen3_30b_a3b_sapo", "--gpus", "0"], "'--gpus': Input should be greater than or equal to 1"),
        (["qwen3_30b_a3b_sapo", "model.path=nobody/nothing"], "nobody/nothing"),
        (["smollm2_sums"], "`sapo train RECIPE --dry-run` does so"),
        (["vision_quickstart"], "of the family qwen3_vl, which has a vision part"),
        (["qwen3_30b_a3b_sapo", "--mfu", "2"], "--mfu must lie in 0..1; got 2; the default is 0.35"),
        (["qwen3_30b_a3b_sapo", "--gpus", "24", "train.context_parallel=24"], "context_parallel=24 does not fit"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    ran = command(*words)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == ""
