"""Objectives of a user's own, `module:Class`: found, checked, and used as ours are."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
import torch

import sapo
from sapo.objectives import OBJECTIVES, Objective, find_objective, gate_weight, make_objective, policy_loss
from support.objective_cases import padded_batch
from support.own_objectives import Plateau

HERE = "support.own_objectives"


def test_a_users_class_is_an_objective_by_its_module_and_name() -> None:
    assert find_objective(f"{HERE}:Plateau") is Plateau
    assert make_objective(f"{HERE}:Plateau", width=0.3) == Plateau(width=0.3)
    assert make_objective(f"{HERE}:WholeRatio").coupled


def test_the_loss_and_the_gate_of_a_padded_batch_are_those_of_the_class() -> None:
    logp_BT, old_BT, advantages_B, mask_BT = padded_batch()
    spec = f"{HERE}:Plateau"
    weight_BT = gate_weight(spec, logp_BT - old_BT, advantages_B, mask_BT, width=0.3)
    # By hand: min(1, width / |r - 1|).
    away_BT = ((logp_BT - old_BT).exp() - 1).abs().clamp(min=1e-9)
    assert torch.allclose(weight_BT, torch.where(mask_BT, (0.3 / away_BT).clamp(max=1), 0.0), rtol=1e-12)
    # token_mean, the class's own, gives each token of the batch 1 / tokens.
    own = policy_loss(spec, logp_BT, old_BT, advantages_B, mask_BT, width=0.3)
    assert own == policy_loss(spec, logp_BT, old_BT, advantages_B, mask_BT, width=0.3, normalizer="token_mean")
    assert own != policy_loss(spec, logp_BT, old_BT, advantages_B, mask_BT, width=0.3, normalizer="sequence_mean")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:Gate", "importing 'no_such_module' failed: ModuleNotFoundError: .*; run from the directory"),
        (f"{HERE}:Plateu", "own_objectives.py has no class 'Plateu'; did you mean 'Plateau'"),
        (f"{HERE}:not_a_class", "must be a class derived from sapo.objectives.Objective; got <function not_a_class"),
        (f"{HERE}:torch", "own_objectives.py has no class 'torch'"),
        (f"{HERE}:NameOfAnother", "must have a name of its own, .*; got 'sapo'; write name: ClassVar"),
        (f"{HERE}:NoName", "must have a name of its own, .*; got None"),
        (f"{HERE}:NoDataclass", "must be a frozen dataclass.*@dataclass\\(frozen=True, kw_only=True\\)"),
        (f"{HERE}:NoFactors", "must define factors; see TokenObjective"),
        (f"{HERE}:NameAsField", "must have name as class variables and not as hyperparameters"),
        (f"{HERE}:WrongNormalizer", "normalizer of objective .* must be one of .*; did you mean 'token_mean'"),
    ],
)
def test_a_class_that_is_no_objective_is_refused_with_the_way_out(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        find_objective(spec)
    assert "\n" not in str(error.value)


def test_a_hyperparameter_it_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"hyperparameter of .*Plateau must be one of width; got 'widht'; did you mean"
    ):
        make_objective(f"{HERE}:Plateau", widht=0.3)
    with pytest.raises(ValueError, match=r"^width must lie in \(0, 1\); got 2"):
        make_objective(f"{HERE}:Plateau", width=2)
    with pytest.raises(ValueError, match="refuses its hyperparameters: TypeError: '<' not supported"):
        make_objective(f"{HERE}:Plateau", width="wide")


def test_a_module_beside_the_command_is_found_and_shadows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_command.py").write_text(
        "from dataclasses import dataclass\nfrom support.own_objectives import Plateau\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Plateau):\n    name = 'mine'\n"
    )
    (tmp_path / "string.py").write_text("raise SystemExit('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "string", raising=False)
    assert make_objective("beside_the_command:Mine").name == "mine"
    assert sys.path[-1] == os.getcwd()
    import string

    assert string.digits


def test_no_objective_of_ours_repeats_the_signature_of_the_base() -> None:
    for kind in OBJECTIVES.values():
        assert issubclass(kind, Objective)
        assert kind.surrogate is Objective.surrogate, kind


def test_the_papers_tau_neg_stands_once_in_the_code() -> None:
    places = []
    for file in sorted(Path(sapo.__file__).parent.rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text()))
        places += [file.name for node in nodes if isinstance(node, ast.Constant) and node.value == 1.05]
    assert places == ["gates.py"]
