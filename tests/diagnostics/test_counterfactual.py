"""Counterfactual gates and true gradients: by hand, against autograd, and without a trace in the run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sapo
from sapo.config.diagnostics import DiagnosticsConfig
from sapo.diagnostics import GatedTokens, counterfactual_figures
from sapo.errors import ConfigError
from sapo.objectives import KLPenalty, make_objective
from support.runs import REWARD, fingerprint, metrics, write_recipe
from support.trainer_cases import make_groups, make_policy, make_trainer, packed_gradient

RATIOS = ([1.0, 1.5], [0.5])
ADVANTAGES = (1.0, -1.0)
WEIGHTS = np.array([0.25, 0.25, 0.5])  # 1 / (length x sequences)


def tokens_of(name: str = "sapo") -> GatedTokens:
    z_M = np.log([r for sequence in RATIOS for r in sequence])
    sequence_M = np.array([0, 0, 1])
    advantage_M = np.array(ADVANTAGES)[sequence_M]
    used = make_objective(name).surrogate(*map(torch.from_numpy, (z_M, advantage_M, sequence_M)), 2)
    return GatedTokens(
        z_M, used.weight_M.numpy(), used.slope_M.numpy(), advantage_M, sequence_M, (0, 1), loss_weight_M=WEIGHTS
    )


def test_what_a_hard_clip_would_have_made_of_the_tokens_is_the_sum_done_by_hand() -> None:
    figures = counterfactual_figures(tokens_of(), {"grpo": make_objective("grpo")})
    # 1.5 > 1.27 with A > 0 and 0.5 < 0.8 with A < 0 are clipped; what is left is grad log pi of the first token.
    assert figures["counterfactual/grpo/eur"] == pytest.approx(1 / 3)
    assert figures["counterfactual/grpo/silenced"] == pytest.approx(2 / 3)
    assert figures["counterfactual/grpo/below_tenth"] == pytest.approx(2 / 3)
    used = [0.25, 0.25 * 1.5 / math.cosh(0.25) ** 2, -0.5 * 0.5 / math.cosh(1.05 * 0.25) ** 2]
    norm = math.sqrt(sum(v * v for v in used))
    assert figures["counterfactual/grpo/norm_ratio"] == pytest.approx(0.25 / norm)
    assert figures["counterfactual/grpo/cosine"] == pytest.approx(0.25 * 0.25 / (0.25 * norm))


@pytest.mark.parametrize("name", ["sapo", "grpo", "sapo_seq"])
def test_the_objective_in_use_is_its_own_counterfactual(name: str) -> None:
    figures = counterfactual_figures(tokens_of(name), {"same": make_objective(name)})
    assert figures["counterfactual/same/cosine"] == pytest.approx(1.0, abs=1e-15)
    assert figures["counterfactual/same/norm_ratio"] == pytest.approx(1.0, abs=1e-15)
    assert figures["counterfactual/same/eur"] == tokens_of(name).weight_M.mean()


def test_a_direction_that_does_not_exist_is_left_out() -> None:
    # s_1 = sqrt(1.5) and s_2 = 0.5 are far outside GSPO's band, on the side their advantage pushes to.
    figures = counterfactual_figures(tokens_of(), {"gspo": make_objective("gspo")})
    assert figures["counterfactual/gspo/silenced"] == 1.0
    assert "counterfactual/gspo/cosine" not in figures


def test_true_gradients_are_those_of_autograd() -> None:
    """The reference updates nothing either: it trains copies by each objective and reads their gradients in float64."""
    groups, objectives = make_groups(), {"grpo": make_objective("grpo"), "tau_10": make_objective("sapo", tau_pos=10.0)}

    def gradient(objective) -> torch.Tensor:
        trainer = make_trainer(make_policy(), objective)
        return torch.cat([g.flatten() for g in packed_gradient(trainer, groups).values()])

    trainer = make_trainer(make_policy())
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    figures = trainer.gradients(trainer.pack(groups), objectives)
    used = gradient(trainer.settings.objective)
    for label, objective in objectives.items():
        other = gradient(objective)
        cosine = torch.nn.functional.cosine_similarity(used, other, dim=0)
        assert figures[f"{label}/cosine"] == pytest.approx(cosine.item(), abs=1e-12)
        assert figures[f"{label}/norm_ratio"] == pytest.approx((other.norm() / used.norm()).item())
        assert figures[f"{label}/cosine"] < 1 - 1e-6, "the ratios of these groups tell the gates apart"
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.policy.model.parameters())


def test_a_penalty_is_no_part_of_the_true_gradients() -> None:
    objectives = {"grpo": make_objective("grpo")}
    plain, penalised = (
        make_trainer(make_policy()),
        make_trainer(make_policy(), kl=KLPenalty(coefficient=10.0, estimator="k2"), reference=make_policy(seed=2)),
    )
    groups = penalised.groups.attach_reference(make_groups())
    with_penalty = penalised.gradients(penalised.pack(groups), objectives)
    assert with_penalty == pytest.approx(plain.gradients(plain.pack(groups), objectives), abs=1e-12)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name: str, **changes) -> Path:
        (tmp_path / name).mkdir()
        return sapo.train(sapo.load_recipe(write_recipe(tmp_path / name, **changes))).directory

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__dtype": "bfloat16", "train__activation_checkpointing": True, "train__tokens_per_microbatch": 40},
        {"objective": {"name": "sapo", "kl": {"coefficient": 0.1}}},
    ],
    ids=["plain", "bfloat16", "kl"],
)
def test_what_is_measured_leaves_no_trace_in_the_run(recipe, changes: dict) -> None:
    everything = {"true_gradient_every": 1, "counterfactuals_every": 1, "distributions_every": 1}
    measured = recipe("measured", diagnostics=everything, **changes)
    nothing = {"true_gradient_every": 0, "counterfactuals_every": 0, "distributions_every": 0}
    plain = recipe("plain", diagnostics=nothing, **changes)
    assert any("true_gradient/grpo/cosine" in m for m in metrics(measured))

    def common(run: Path) -> list[dict]:
        lines = [m for m in metrics(run) if m["kind"] != "distribution"]
        own = ("true_gradient/", "counterfactual/")
        return [{k: v for k, v in m.items() if not k.startswith(own)} for m in lines]

    assert common(measured) == common(plain)
    files = {k: v for k, v in fingerprint(measured, 6).items() if k != "metrics"}
    assert files == {k: v for k, v in fingerprint(plain, 6).items() if k != "metrics"}


def test_on_policy_every_gate_weighs_everything_and_the_gradients_are_one(recipe) -> None:
    run = recipe("run", diagnostics={"true_gradient_every": 1, "counterfactuals_every": 1})
    first = [m for m in metrics(run) if m["kind"] == "update" and m["on_policy"]]
    assert len(first) == 6
    for update in first:
        # The engine's log-probabilities are the trainer's up to float32 rounding.
        assert update["counterfactual/sapo_tau_10.0/eur"] == pytest.approx(1.0, abs=1e-6)
        assert update["counterfactual/grpo/silenced"] == 0.0
        assert update["counterfactual/grpo/cosine"] == pytest.approx(1.0, abs=1e-6)
        assert update["true_gradient/grpo/cosine"] == pytest.approx(1.0, abs=1e-6)


def test_two_counterfactuals_of_one_name_need_labels_and_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="counterfactuals must differ in their label; got 'sapo' twice; give one a la"):
        DiagnosticsConfig(counterfactuals=[{"name": "sapo"}, {"name": "sapo", "tau_pos": 2.0}])
    with pytest.raises(ConfigError, match=r"counterfactuals.0: tau_pos must be positive and finite; got -1"):
        sapo.load_recipe("quickstart", ["diagnostics.counterfactuals=[{name: sapo, tau_pos: -1}]"])
