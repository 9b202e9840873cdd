"""Diagnostics: figures against sums done by hand; what was not measured is absent."""

from __future__ import annotations

import math

import pytest
import torch

from sapo.data import Completion, Group, Prompt, Score, Status
from sapo.diagnostics import rollout_metrics, update_metrics
from sapo.objectives import make_objective
from sapo.training.trainer import UpdateResult


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


def test_rollout_figures_count_statuses_and_groups_that_teach_nothing() -> None:
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
    assert [figures[f"status/{s.value}"] for s in Status] == [2, 1, 1, 0]
    assert figures["task/a/reward/mean"] == 0.5
    assert figures["task/b/status/truncated"] == 1
    assert not any(k.startswith("task/") for k in rollout_metrics(groups[:1])), "one task needs no figures of its own"
