"""Objectives by name; every wrong option is refused with the rule, the value got and the way out."""

import dataclasses
import math

import pytest

from sapo.objectives import ADVANTAGES, NORMALIZERS, OBJECTIVES, make_objective

SOFT = ("sapo", "sapo_seq")
HARD = ("grpo", "gspo", "gspo_token", "dr_grpo", "dapo", "minirl", "rloo", "luspo")
NAMES = ["sapo", "grpo", "gspo", "gspo_token", "sapo_seq", "dr_grpo", "dapo", "minirl", "reinforce", "rloo", "cispo"]


def test_the_registry_names_each_objective_as_it_names_itself():
    assert list(OBJECTIVES) == [*NAMES, "maspo", "gmpo", "luspo", "vespo", "dppo_tv"]
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert make_objective(name) == objective()


def test_defaults_are_those_of_the_papers():
    # SAPO: arXiv 2511.20347. The clips: the settings of arXiv 2507.18071.
    assert dataclasses.asdict(make_objective("sapo")) == {
        "tau_pos": 1.0, "tau_neg": 1.05, "gate": "sigmoid", "side": "both"
    }  # fmt: skip
    assert dataclasses.asdict(make_objective("sapo_seq")) == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert dataclasses.asdict(make_objective("grpo")) == {"eps_low": 0.2, "eps_high": 0.27}
    assert dataclasses.asdict(make_objective("gspo")) == {"eps_low": 3e-4, "eps_high": 4e-4}
    assert dataclasses.asdict(make_objective("gspo_token")) == {"eps_low": 3e-4, "eps_high": 4e-4}
    # arXiv 2503.14476, 2602.05261; TRL's RLOOTrainer; arXiv 2510.13786 as TRL recommends it; 2507.20673; 2602.10693.
    assert dataclasses.asdict(make_objective("dr_grpo")) == {"eps_low": 0.2, "eps_high": 0.2}
    assert dataclasses.asdict(make_objective("dapo")) == {"eps_low": 0.2, "eps_high": 0.28}
    assert dataclasses.asdict(make_objective("minirl")) == {"eps_low": 0.2, "eps_high": 0.27}
    assert dataclasses.asdict(make_objective("luspo")) == {"eps_low": 2e-3, "eps_high": 2.5e-3}
    assert dataclasses.asdict(make_objective("rloo")) == {"eps_low": 0.2, "eps_high": 0.2}
    assert dataclasses.asdict(make_objective("cispo")) == {"ratio_cap": 5.0}
    # The authors' code, github.com/FlyTune/MASPO-RL; verl's dppo_tv.
    assert dataclasses.asdict(make_objective("maspo")) == {
        "sigma": 1.0, "alpha": 0.3, "beta_pos": 0.03, "beta_neg": 0.03, "sigma_max": 10.0
    }  # fmt: skip
    assert dataclasses.asdict(make_objective("dppo_tv")) == {"tv_low": 0.2, "tv_high": 0.2, "ratio_cap": 20.0}
    assert dataclasses.asdict(make_objective("gmpo")) == {"log_low": 0.4, "log_high": 0.4}
    assert dataclasses.asdict(make_objective("vespo")) == {
        "k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0
    }  # fmt: skip


def test_each_objective_names_the_advantage_of_its_source():
    other = {"dr_grpo": "group_mean", "minirl": "group_mean", "reinforce": "group_mean", "rloo": "leave_one_out"}
    for name, objective in OBJECTIVES.items():
        assert objective.advantage == other.get(name, "group_std")
        assert objective.advantage in ADVANTAGES
        assert objective.normalizer in NORMALIZERS


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_frozen_and_take_keywords_only(name):
    objective = make_objective(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, next((f.name for f in dataclasses.fields(objective)), "anything"), 0.5)
    with pytest.raises(TypeError):
        OBJECTIVES[name](0.5)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, -math.inf, "1", None])
@pytest.mark.parametrize(
    ("name", "option", "paper"),
    [
        *((name, option, paper) for name in SOFT for option, paper in (("tau_pos", "1.0"), ("tau_neg", "1.05"))),
        ("maspo", "sigma", "1.0"),
        ("maspo", "sigma_max", "10.0"),
        ("dppo_tv", "tv_low", "0.2"),
        ("dppo_tv", "tv_high", "0.2"),
        ("gmpo", "log_low", "0.4"),
        ("gmpo", "log_high", "0.4"),
        ("vespo", "k_pos", "2.0"),
        ("vespo", "lambda_pos", "3.0"),
        ("vespo", "k_neg", "3.0"),
        ("vespo", "lambda_neg", "2.0"),
    ],
)
def test_a_setting_that_is_not_positive_and_finite_is_refused(name, option, paper, bad):
    with pytest.raises(ValueError) as error:
        make_objective(name, **{option: bad})
    assert str(error.value) == f"{option} must be positive and finite; got {bad!r}; the paper uses {paper}"


@pytest.mark.parametrize("bad", [-0.1, 1.0, 2.0, math.nan, math.inf, "0.2"])
@pytest.mark.parametrize("option", ["eps_low", "eps_high"])
@pytest.mark.parametrize("name", HARD)
def test_a_clip_outside_zero_to_one_is_refused(name, option, bad):
    with pytest.raises(ValueError) as error:
        make_objective(name, **{option: bad})
    paper = getattr(make_objective(name), option)
    assert str(error.value) == f"{option} must satisfy 0 <= {option} < 1; got {bad!r}; the paper uses {paper}"


@pytest.mark.parametrize("bad", [0.999, -1.0, math.nan, math.inf, "5"])
@pytest.mark.parametrize(("name", "paper"), [("cispo", 5.0), ("dppo_tv", 20.0)])
def test_a_cap_below_one_is_refused(name, paper, bad):
    with pytest.raises(ValueError) as error:
        make_objective(name, ratio_cap=bad)
    assert str(error.value) == f"ratio_cap must be finite and at least 1; got {bad!r}; the paper uses {paper}"


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "1", None])
@pytest.mark.parametrize("option", ["alpha", "beta_pos", "beta_neg"])
def test_a_setting_of_maspo_below_zero_is_refused(option, bad):
    with pytest.raises(ValueError) as error:
        make_objective("maspo", **{option: bad})
    paper = getattr(make_objective("maspo"), option)
    assert str(error.value) == f"{option} must be finite and at least 0; got {bad!r}; the paper uses {paper}"


def test_a_largest_width_below_the_width_is_refused():
    with pytest.raises(ValueError, match=r"sigma_max must be at least sigma, 3.0; got 2.0; raise sigma_max"):
        make_objective("maspo", sigma=3.0, sigma_max=2.0)


def test_the_edges_of_the_allowed_ranges_are_allowed():
    make_objective("cispo", ratio_cap=1)
    make_objective("grpo", eps_low=0, eps_high=0.999)
    make_objective("sapo", tau_pos=1e-6, tau_neg=1e6)


def test_unknown_names_suggest_the_nearest_and_list_the_options():
    with pytest.raises(
        ValueError, match=r"objective must be one of cispo, .*, vespo; got 'spao'; did you mean 'sapo'\?"
    ):
        make_objective("spao")
    with pytest.raises(ValueError, match=r"objective must be one of .*; got 'xyz'; choose one of these"):
        make_objective("xyz")
    with pytest.raises(ValueError, match=r"gate must be one of arctan, erf.*; got 'sigmod'; did you mean 'sigmoid'\?"):
        make_objective("sapo", gate="sigmod")
    with pytest.raises(ValueError, match=r"side must be one of both, drift; got 'drft'; did you mean 'drift'\?"):
        make_objective("sapo", side="drft")


def test_a_hyperparameter_of_another_objective_is_refused_and_not_ignored():
    with pytest.raises(ValueError, match=r"hyperparameter of sapo must be one of gate.*tau_pos; got 'eps_low'"):
        make_objective("sapo", eps_low=0.2)
    with pytest.raises(ValueError, match=r"hyperparameter of grpo must be one of eps_high, eps_low; got 'tau_pos'"):
        make_objective("grpo", tau_pos=1.0)
    with pytest.raises(ValueError, match=r"reinforce takes no hyperparameters; got eps_low; leave it out"):
        make_objective("reinforce", eps_low=0.2)
    with pytest.raises(ValueError, match=r"hyperparameter of sapo .*got 'tau_negative'; did you mean 'tau_neg'\?"):
        make_objective("sapo", tau_negative=1.05)
