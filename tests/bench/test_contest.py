"""Both sides of every measurement do the same work: real processes of us and the peers on a few tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.contest import Contest, Machine, SideError, SideSpec, check_same_work, run_contest
from bench.workloads import Workload

from bench import contests

pytest.importorskip("trl")
pytest.importorskip("liger_kernel")

MACHINE = Machine(threads=1, device="cpu", timeout=300.0)
TINY = Workload("qwen3", prompts=4, samples=4, prompt_tokens=(5, 9), new_tokens=(3, 12), minibatches=2)


def run(tmp_path: Path, sides: tuple[SideSpec, ...], workload: Workload = TINY) -> dict:
    contest = contests._of("a-contest", "A contest", workload, sides, 2, quick=False, limit="decode")
    return run_contest(contest, MACHINE, tmp_path, say=lambda _: None)


def side_facts(result: dict) -> dict[str, dict]:
    assert not [s["error"] for s in result["sides"].values() if "error" in s]
    return {name: side["facts"][-1] for name, side in result["sides"].items()}


ROLLOUTS = Workload("qwen3_moe", 3, 4, (5, 9), (3, 12))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A contest of three sides that draw, of one that is not installed, and of one that fails."""
    scratch = tmp_path_factory.mktemp("rollouts")
    sides = (
        contests._ours("rollout", "float32"),
        contests._hf("generate", "float32"),
        contests._hf("continuous", "float32"),
        contests._vllm(scratch / "no-environment", "float32"),
        SideSpec("broken float32", "hf", {"role": "no such role", "dtype": "float32"}),
    )
    return run(scratch, sides, ROLLOUTS)


@pytest.mark.slow
def test_every_rollout_side_draws_each_sequence_at_its_length(rollouts):
    sides = {name: side for name, side in rollouts["sides"].items() if "error" not in side}
    assert len(sides) == 3
    assert {side["facts"][-1]["tokens"] for side in sides.values()} == {ROLLOUTS.tokens}
    for side in sides.values():
        assert len(side["seconds"]) == 2
        assert side["peak"] > side["imports"] > 0
    assert "SGEMM" in sides["generate float32"]["backends"]


@pytest.mark.slow
def test_an_update_has_trls_losses(tmp_path):
    sides = (contests._ours("update", "float32"), contests._trl("update", "float32"))
    facts = side_facts(run(tmp_path, sides))
    losses = {name: f["losses"] for name, f in facts.items()}
    assert len(losses["sapo float32"]) == TINY.minibatches
    # TRL divides by the deviation plus 1e-4.
    assert losses["sapo float32"] == pytest.approx(losses["TRL float32"], rel=5e-3)
    assert max(map(abs, losses["sapo float32"])) > 1e-3


@pytest.mark.slow
def test_a_whole_step_has_trls_tokens(tmp_path):
    sides = (contests._ours("step", "float32"), contests._trl("step", "float32"))
    facts = side_facts(run(tmp_path, sides))
    assert {f["tokens"] for f in facts.values()} == {TINY.tokens}
    assert facts["sapo float32"]["old_logprobs"] == "engine"


@pytest.mark.slow
def test_every_head_has_one_loss_and_one_gradient(tmp_path):
    heads = {c.name: c for c in contests.contests(quick=True)}
    facts = side_facts(run_contest(heads["head-49k"], MACHINE, tmp_path, rounds=1, say=lambda _: None))
    assert len(facts) == 4
    reference = facts["PyTorch float32"]
    assert reference["norm"] > 0
    for fact in facts.values():
        assert fact["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert fact["norm"] == pytest.approx(reference["norm"], rel=1e-4)


@pytest.mark.slow
def test_a_peer_that_cannot_run_is_reported_and_ours_is_an_error(rollouts, tmp_path):
    assert "No such file" in rollouts["sides"]["vLLM float32"]["error"]
    assert "KeyError" in rollouts["sides"]["broken float32"]["error"]
    ours = SideSpec("sapo float32", "ours", {"role": "no such role", "dtype": "float32"})
    with pytest.raises(SideError, match=r"sapo float32 ended with code 1: KeyError"):
        run(tmp_path, (ours,))


def test_sides_that_did_other_work_are_refused():
    def record(work: float, **facts) -> dict:
        return {"work": work, "facts": [{"tokens": work, **facts}], "seconds": [1.0]}

    ours = record(8, losses=[0.1, 0.2])
    check_same_work("x", {"sapo float32": ours, "TRL float32": record(8, losses=[0.1, 0.2003])})
    with pytest.raises(ValueError, match=r"must do the same work; sapo float32 did 8 .* TRL float32 9"):
        check_same_work("x", {"sapo float32": ours, "TRL float32": record(9)})
    with pytest.raises(ValueError, match="losses of sapo float32 and TRL float32 differ"):
        check_same_work("x", {"sapo float32": ours, "TRL float32": record(8, losses=[0.1, 0.21])})
    # In bfloat16 the first loss, on policy, is still held to a twentieth.
    check_same_work("x", {"sapo float32": ours, "TRL bfloat16": record(8, losses=[0.104, 0.3])})
    with pytest.raises(ValueError, match="differ"):
        check_same_work("x", {"sapo float32": ours, "TRL bfloat16": record(8, losses=[0.11, 0.2])})


def test_lengths_are_drawn_once_within_their_bounds():
    workload = Workload("smollm2", prompts=8, samples=8, prompt_tokens=(16, 32), new_tokens=(16, 128))
    lengths = [n for group in workload.limits for n in group]
    assert workload.limits == workload.limits
    assert len(lengths) == 64
    assert 16 <= min(lengths) < 32
    assert 112 < max(lengths) <= 128


def test_every_measurement_has_a_name_of_its_own_and_every_goal_a_measurement():
    from bench.report import GOALS

    known: list[Contest] = list(contests.contests())
    sides = {c.name: {s.name for s in c.sides} for c in known}
    assert len(sides) == len(known)
    for goal in GOALS:
        assert goal.ours in sides[goal.contest]
        assert goal.peer in sides[goal.contest] | {"limit"}
