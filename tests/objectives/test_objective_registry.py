"""Objectives by name; every wrong option is refused with the rule, the value got and the way out."""

import dataclasses
import math

import pytest

from sapo.objectives import OBJECTIVES, make_objective

SOFT, HARD = ("sapo", "sapo_seq"), ("grpo", "gspo", "gspo_token")


def test_the_registry_names_each_objective_as_it_names_itself():
    assert list(OBJECTIVES) == ["sapo", "grpo", "gspo", "gspo_token", "sapo_seq"]
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_frozen_and_take_keywords_only(name):
    objective = make_objective(name)
    field = dataclasses.fields(objective)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, field, 0.5)
    with pytest.raises(TypeError):
        OBJECTIVES[name](0.5)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, -math.inf, "1", None])
@pytest.mark.parametrize(("option", "paper"), [("tau_pos", "1.0"), ("tau_neg", "1.05")])
@pytest.mark.parametrize("name", SOFT)
def test_a_temperature_that_is_not_positive_and_finite_is_refused(name, option, paper, bad):
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


def test_the_edges_of_the_allowed_ranges_are_allowed():
    make_objective("grpo", eps_low=0, eps_high=0.999)
    make_objective("sapo", tau_pos=1e-6, tau_neg=1e6)


def test_unknown_names_suggest_the_nearest_and_list_the_options():
    with pytest.raises(ValueError, match=r"objective must be one of gr.*, sapo_seq; got 'spao'; did you mean 'sapo'\?"):
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
    with pytest.raises(ValueError, match=r"hyperparameter of sapo .*got 'tau_negative'; did you mean 'tau_neg'\?"):
        make_objective("sapo", tau_negative=1.05)
