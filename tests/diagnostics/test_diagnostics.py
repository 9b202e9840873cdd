"""Diagnostics: figures against sums done by hand; what was not measured is absent."""

from __future__ import annotations

import math

import pytest
import torch

from sapo.data import Completion, Group, Prompt, Score, Status
from sapo.diagnostics import (
    gated_tokens,
    minibatch_metrics,
    rollout_metrics,
    sequence_figures,
    step_update_metrics,
    task_update_metrics,
    update_metrics,
)
from sapo.objectives import discrepancy_bound, gate_discrepancy, make_objective, variance
from sapo.training.update_result import UpdateResult


def result_of(ratios: list[list[float]], advantages: list[float], entropy: list[float] | None = None) -> UpdateResult:
    log_ratio_M = torch.tensor([math.log(r) for sequence in ratios for r in sequence], dtype=torch.float64)
    sequence_M = torch.tensor([i for i, sequence in enumerate(ratios) for _ in sequence])
    advantage_M = torch.tensor(advantages, dtype=torch.float64)[sequence_M]
    surrogate = make_objective("sapo").surrogate(log_ratio_M, advantage_M, sequence_M, len(ratios))
    return UpdateResult(
        loss=0.25,
        grad_norm=2.0,
        log_ratio_M=log_ratio_M,
        weight_M=surrogate.weight_M,
        slope_M=surrogate.slope_M,
        advantage_M=advantage_M,
        sequence_M=sequence_M,
        sequence_ids=tuple(range(len(ratios))),
        entropy_M=None if entropy is None else torch.tensor(entropy),
        num_packed_tokens=9,
    )


def sech2(x: float) -> float:
    return 1 / math.cosh(x) ** 2


def test_update_figures_are_the_sums_done_by_hand() -> None:
    figures = update_metrics(result_of([[1.0, 1.5], [0.5]], [1.0, -1.0], entropy=[0.1, 0.2, 0.6]))
    weights = [1.0, sech2(0.25), sech2(1.05 * -0.25)]  # sech^2(tau (r - 1) / 2)
    assert figures["ratio/abs_dev"] == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert (figures["ratio/min"], figures["ratio/max"]) == (pytest.approx(0.5), pytest.approx(1.5))
    assert figures["gate/eur"] == pytest.approx(sum(weights) / 3)
    assert figures["gate/eur_pos"] == pytest.approx(sum(weights[:2]) / 2)
    assert figures["gate/eur_neg"] == pytest.approx(weights[2])
    assert figures["gate/min"] == pytest.approx(min(weights))
    assert figures["gate/effective_tokens"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))
    spread = (math.log(1.5) / 2) ** 2  # two log-ratios, 0 and log 1.5, each half their distance from the mean
    assert figures["theory/variance_max"] == pytest.approx(spread)
    assert figures["theory/low_variance_share"] == 0.5
    mean_gate = (1 + sech2(math.log(1.5) / 2)) / 2
    assert figures["theory/discrepancy_max"] == pytest.approx(abs(mean_gate - sech2(math.log(1.5) / 4)))
    assert figures["theory/bound_violations"] == 0
    assert figures["entropy"] == pytest.approx(0.3)
    assert figures["tokens/gradient"] == 3


def test_what_was_not_measured_is_absent() -> None:
    figures = update_metrics(result_of([[1.0, 1.5]], [1.0]))
    assert "entropy" not in figures
    assert "gate/eur_neg" not in figures
    empty = torch.zeros(0, dtype=torch.float64)
    skipped = UpdateResult(0.0, 0.0, empty, empty, empty, empty, empty.long(), (), None, 0, skipped=True)
    assert update_metrics(skipped) == {}


def test_a_ratio_far_outside_stays_finite() -> None:
    result = result_of([[1.0, 1.5]], [1.0])
    far = UpdateResult(**{**result.__dict__, "log_ratio_M": torch.tensor([800.0, -800.0], dtype=torch.float64)})
    figures = update_metrics(far)
    assert all(math.isfinite(v) for v in figures.values())


def test_rollout_figures_count_statuses_and_zero_variance_groups() -> None:
    def completion(reward: float, length: int, status: Status = Status.SCORED) -> Completion:
        return Completion((1,) * length, (-0.5,) * length, "stop", score=Score(reward, status))

    groups = [
        Group(Prompt(0, "a", ""), (completion(1.0, 2), completion(0.0, 4)), (0.7, -0.7)),
        Group(
            Prompt(1, "b", ""), (completion(0.0, 3, Status.TRUNCATED), completion(0.0, 3, Status.UNPARSEABLE)), (0, 0)
        ),
    ]
    figures = rollout_metrics(groups)
    assert figures["reward/mean"] == 0.25
    assert figures["pass@1"] == 0.25
    assert figures["groups/zero_variance"] == 0.5
    assert figures["length/mean"] == 3.0
    assert figures["tokens/generated"] == 12
    statuses = {name: count for name, count in figures.items() if name.startswith("status/")}
    assert list(statuses.values()) == [2, 1, 1, 0], f"without errors of environments, where there are none: {statuses}"
    assert figures["task/a/reward/mean"] == 0.5
    assert figures["task/b/status/truncated"] == 1
    assert not any(k.startswith("task/") for k in rollout_metrics(groups[:1])), "one task needs no figures of its own"
    assert rollout_metrics(groups[:1], by_task=True)["task/a/groups"] == 1, "unless the run has others"
    assert not {k for k in figures if k.startswith(("figure/", "overlong/")) or "dropped" in k or "shaped" in k}


def completion_of(reward: float, length: int, **figures: float) -> Completion:
    return Completion((1,) * length, (-0.5,) * length, "stop", score=Score(reward, figures=figures))


def test_what_was_dropped_is_counted_and_part_of_what_is_measured() -> None:
    kept = [Group(Prompt(0, "a", ""), (completion_of(1.0, 2), completion_of(0.0, 4)), (0.7, -0.7))]
    dropped = [
        Group(Prompt(1, "a", ""), (completion_of(1.0, 3), completion_of(1.0, 3)), (0, 0)),
        Group(Prompt(2, "b", ""), (completion_of(0.0, 5), completion_of(0.0, 7)), (0, 0)),
    ]
    figures = rollout_metrics(kept, dropped)
    assert (figures["groups"], figures["groups/kept"], figures["groups/dropped"]) == (3, 1, 2)
    assert (figures["tokens/generated"], figures["tokens/dropped"]) == (24, 18)
    assert figures["pass@1"] == 3 / 6, "of all that was sampled: dropping what is solved must not hide it"
    assert figures["groups/zero_variance"] == pytest.approx(2 / 3)
    assert (figures["task/a/groups/kept"], figures["task/b/groups/kept"], figures["task/b/tokens/dropped"]) == (
        1,
        0,
        12,
    )


def test_a_verifiers_figures_are_means_over_the_completions_that_have_them() -> None:
    grid = (completion_of(0.0, 2, cells=0.5), completion_of(0.0, 2))  # the second could not be parsed
    groups = [
        Group(Prompt(0, "zebra", ""), grid, (0, 0)),
        Group(Prompt(1, "zebra", ""), (completion_of(1.0, 2, cells=1.0),) * 2, (0, 0)),
        Group(Prompt(2, "sums", ""), (completion_of(1.0, 2, steps=3.0),) * 2, (0, 0)),
    ]
    figures = rollout_metrics(groups)
    assert figures["figure/cells"] == figures["task/zebra/figure/cells"] == pytest.approx(2.5 / 3)
    assert figures["task/sums/figure/steps"] == 3.0
    assert "task/sums/figure/cells" not in figures


def test_overlong_figures_keep_the_shaped_reward_apart_from_the_verifiers() -> None:
    pair = (completion_of(1.0, 2), completion_of(1.0, 4))
    shaped = rollout_metrics([Group(Prompt(0, "a", ""), pair, (0.7, -0.7), shaped_rewards=(1.0, 0.5))])
    assert (shaped["reward/mean"], shaped["pass@1"], shaped["reward/shaped_mean"]) == (1.0, 1.0, 0.75)
    assert (shaped["overlong/penalty_mean"], shaped["overlong/penalised"]) == (-0.25, 0.5)
    assert "overlong/masked" not in shaped
    masked = rollout_metrics([Group(Prompt(0, "a", ""), pair, (0, 0), masked=(False, True))])
    assert masked["overlong/masked"] == 0.5
    assert "reward/shaped_mean" not in masked


def test_each_tasks_gate_and_entropy_are_those_of_its_own_tokens() -> None:
    result = result_of([[1.0, 1.5], [0.5], [2.0]], [1.0, -1.0, 1.0], entropy=[0.1, 0.2, 0.6, 0.4])
    # Sequences 0, 2 and 5 of a mini-batch of three groups of two carried a gradient.
    result = UpdateResult(**{**result.__dict__, "sequence_ids": (0, 2, 5)})
    figures = task_update_metrics(result, ["a", "a", "b", "b", "a", "a"])
    assert figures["task/a/gate/eur"] == pytest.approx((1 + sech2(0.25) + sech2(0.5)) / 3)
    assert figures["task/b/gate/eur"] == pytest.approx(sech2(1.05 * -0.25))
    assert (figures["task/a/tokens/gradient"], figures["task/b/tokens/gradient"]) == (3, 1)
    assert figures["task/a/entropy"] == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    assert figures["task/b/entropy"] == pytest.approx(0.6)


def test_a_steps_means_are_over_the_updates_that_measured_them() -> None:
    updates = [
        {"skipped": True},
        {"skipped": False, "loss": 1.0, "ratio/abs_dev": 0.1, "task/a/gate/eur": 0.5},
        {"skipped": False, "loss": 3.0, "ratio/abs_dev": 0.3},
    ]
    assert step_update_metrics(updates, ["a", "b"]) == {
        "update/loss": 2.0,
        "update/ratio/abs_dev": pytest.approx(0.2),
        "task/a/update/gate/eur": 0.5,
        "first_update/ratio/abs_dev": 0.1,
        "updates/skipped": 1,
    }


def test_figures_by_sign_are_those_of_the_tokens_of_that_sign() -> None:
    figures = update_metrics(result_of([[1.0, 1.5], [0.5], [2.0]], [1.0, -1.0, 3.0], entropy=[0.1, 0.2, 0.6, 0.4]))
    moved = [figures[f"log_ratio/{q}_pos"] for q in ("min", "p50", "max")]
    assert moved == pytest.approx([0, math.log(1.5), math.log(2)])
    assert figures["log_ratio/p001_neg"] == figures["log_ratio/p999_neg"] == pytest.approx(math.log(0.5))
    # r f'(r), whatever the advantage: at r = 2 it is 2 sech^2(1/2), above the 1 of r = 1.
    assert figures["slope/max_pos"] == pytest.approx(2 * sech2(0.5))
    assert figures["slope/max_neg"] == pytest.approx(0.5 * sech2(1.05 * 0.25))
    assert figures["gate/p01_pos"] == figures["gate/min_pos"] == pytest.approx(sech2(0.5))
    assert figures["gate/max_pos"] == 1.0
    assert (figures["entropy_pos"], figures["entropy_neg"]) == (pytest.approx(0.7 / 3), pytest.approx(0.6))
    assert "slope/p50_neg" not in update_metrics(result_of([[1.0]], [1.0])), "no token of that sign"


def test_what_the_sequence_gate_leaves_out_is_the_sum_done_by_hand() -> None:
    figures = update_metrics(result_of([[1.0, 1.5], [1.05, 1.0]], [1.0, 1.0]))
    assert (figures["theory/near_one_share"], figures["theory/mostly_near_one_share"]) == (0.5, 0.5)
    errors, logs = [], []
    for ratios in ([1.0, 1.5], [1.05, 1.0]):
        gate = sech2(sum(math.log(r) for r in ratios) / 2 / 2)
        errors.append(abs(sum(r * sech2((r - 1) / 2) for r in ratios) / 2 - gate))
        logs.append(abs(sum(sech2((r - 1) / 2) - sech2(math.log(r) / 2) for r in ratios) / 2))
    assert figures["theory/gate_error_mean"] == pytest.approx(sum(errors) / 2)
    assert figures["theory/gate_error_max"] == pytest.approx(max(errors))
    assert figures["theory/log_gate_error_mean"] == pytest.approx(sum(logs) / 2)
    calm = update_metrics(result_of([[1.0, 1.0], [1.0]], [1.0, -1.0]))
    assert (calm["theory/slope_error"], calm["theory/gate_error_max"], calm["theory/near_one_share"]) == (0.0, 0.0, 1.0)


def test_the_figures_of_sequences_are_those_of_the_theory() -> None:
    """The same quantities by sapo.objectives.theory, in torch."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 17, 40]
    ratios = [(0.4 * torch.randn(n, generator=generator, dtype=torch.float64)).exp().tolist() for n in lengths]
    result = result_of(ratios, [1.0, -1.0, 0.5, -2.0])
    found = sequence_figures(gated_tokens(result), tau_pos=2.0, tau_neg=3.0)
    arguments = (result.log_ratio_M, result.sequence_M, len(lengths))
    tau_B = torch.tensor([2.0, 3.0, 2.0, 3.0])
    expected = {
        "variance_B": variance(*arguments),
        "discrepancy_B": gate_discrepancy(*arguments, tau=tau_B),
        "bound_B": discrepancy_bound(*arguments, tau=tau_B.double()),
    }
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(values.numpy(), rel=1e-12, abs=1e-15), name


def test_the_slope_error_is_the_distance_to_the_sequence_gates_slopes() -> None:
    """By sapo's own objectives: v of `sapo`, u of `sapo_seq`, weighed alike."""
    result = result_of([[1.0, 1.5, 0.7], [0.5, 1.1]], [1.0, -1.0])
    other = make_objective("sapo_seq").surrogate(result.log_ratio_M, result.advantage_M, result.sequence_M, 2).slope_M
    expected = (result.slope_M - other).norm() / result.slope_M.norm()
    assert update_metrics(result)["theory/slope_error"] == pytest.approx(expected.item())


def test_updates_at_the_weights_that_sampled_are_told_from_later_ones() -> None:
    updates = [
        {"skipped": False, "on_policy": True, "gate/eur": 1.0},
        {"skipped": False, "on_policy": False, "gate/eur": 0.5},
        {"skipped": False, "on_policy": False, "gate/eur": 0.7},
    ]
    figures = step_update_metrics(updates, [])
    assert figures["on_policy/gate/eur"] == 1.0
    assert figures["off_policy/gate/eur"] == pytest.approx(0.6)


def test_groups_that_are_all_right_have_zero_variance_and_are_no_flood() -> None:
    right = Group(Prompt(0, "a", ""), (completion_of(1.0, 2), completion_of(1.0, 4)), (0, 0))
    wrong = Group(Prompt(1, "a", ""), (completion_of(0.0, 2), completion_of(0.0, 4)), (0, 0))
    mixed = Group(Prompt(2, "a", ""), (completion_of(0.0, 2), completion_of(1.0, 4)), (-0.7, 0.7))
    figures = rollout_metrics([right, wrong, mixed, right])
    assert (figures["groups/zero_variance"], figures["groups/none_right"]) == (0.75, 0.25)
    batch = minibatch_metrics([wrong, mixed])
    assert (batch["batch/zero_variance"], batch["batch/reward_mean"], batch["batch/length_mean"]) == (0.5, 0.25, 3.0)
    assert batch["batch/status/scored"] == 4
