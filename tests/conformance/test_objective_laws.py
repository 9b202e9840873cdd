"""Every objective of ours obeys the laws of objectives too. A class of a user's with one fault breaks each of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sapo import cli
from sapo.conformance import (
    BROKEN,
    DOES_NOT_APPLY,
    HELD,
    LAWS,
    OBJECTIVE_LAWS,
    REQUIRED,
    judge_objective,
    objective_subject,
)
from sapo.conformance.report import judge_function, markdown
from sapo.objectives import OBJECTIVES
from support.objective_cases import VARIANT_IDS, VARIANTS

HERE = "support.own_objectives"


@pytest.mark.parametrize(("name", "hyper"), [*VARIANTS, *((name, {}) for name in OBJECTIVES)])
def test_every_objective_of_ours_obeys_every_law_of_objectives(name: str, hyper: dict[str, object]) -> None:
    subject = objective_subject(name, hyper)
    verdicts = [law(subject) for law in OBJECTIVE_LAWS.values()]
    assert [str(v) for v in verdicts if v.status == BROKEN] == []
    coupled = {v.law for v in verdicts if v.status == DOES_NOT_APPLY}
    assert coupled == ({"uncoupled_tokens_are_independent"} if OBJECTIVES[name].coupled else set())


def test_there_are_variants_of_every_objective() -> None:
    assert {name for name, _ in VARIANTS} == set(OBJECTIVES)
    assert len(VARIANT_IDS) == len(VARIANTS)


@pytest.mark.parametrize(
    ("fault", "law", "example"),
    [
        # The slope is f' = 1 inside the plateau and not f' r = exp(0.1).
        ("WrongSlope", "slope_is_the_derivative", "A = 1, log r = [0.1]: the slope of token 1 is 1, the derivative of "
         "the value 1.10517"),
        ("StoppedGradient", "value_integrates_the_slope", "A = 1, log r = [0.1]: the slope of token 1 is 1.10517, the "
         "finite difference of the value 1.21568"),
        ("HiddenMean", "uncoupled_tokens_are_independent", "A = -1, log r = [0, -1]: the value of token 1 is -0.68394, "
         "that of the token alone -1; set coupled to True if the tokens of a sequence are gated together"),
        ("OneNumber", "surrogate_is_per_token", "A = 1, log r = [0]: the slope is () float32 and not (1,) float32 "
         "(float32)"),
    ],
)  # fmt: skip
def test_a_fault_is_found_at_its_smallest_case(fault: str, law: str, example: str) -> None:
    verdict = OBJECTIVE_LAWS[law](objective_subject(f"{HERE}:{fault}"))
    assert str(verdict) == f"{law}: {example}"
    assert OBJECTIVE_LAWS[law](objective_subject(f"{HERE}:Plateau")).status == HELD


def test_what_a_run_relies_on_refuses_it_and_what_is_design_does_not() -> None:
    assert set(OBJECTIVE_LAWS) | set(LAWS) > REQUIRED
    assert {*OBJECTIVE_LAWS, *LAWS} - REQUIRED == {
        "value_integrates_the_slope",
        "gradient_is_the_papers",
        "weight_is_one_on_policy",
        "refuses_a_temperature_of_zero_or_less",
    }
    half = judge_objective(f"{HERE}:HalfOpen")
    assert half.refusal is None
    assert [v.law for v in half.broken_by_design] == ["weight_is_one_on_policy"]
    hidden = judge_objective(f"{HERE}:HiddenMean", {"width": 0.3})
    assert hidden.refusal is not None
    assert hidden.refusal.startswith(
        f"objective {HERE}:HiddenMean breaks the law uncoupled_tokens_are_independent: A ="
    )
    assert "; it also breaks equal_microbatches_add_up, unequal_microbatches_add_up; correct" in hidden.refusal
    assert "\n" not in hidden.refusal


def test_hyperparameters_are_judged_as_given() -> None:
    found = judge_objective("sapo", {"tau_pos": 3.0})
    assert "tau_pos=3.0" in found.lines()[0]
    assert found.refusal is None
    assert found.lines()[-1] == "  does not apply: none"


def test_an_error_of_the_class_is_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.own_objectives import Plateau

    def fail(self: Plateau, at: object) -> None:
        raise RuntimeError("no\nsecond line")

    monkeypatch.setattr(Plateau, "factors", fail)
    refusal = judge_objective(f"{HERE}:Plateau").refusal
    assert refusal is not None
    assert "surrogate_is_per_token: A = 1, log r = [0]: RuntimeError: no (float32); it also breaks" in refusal


def test_the_command_judges_a_class_as_the_objective_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sapo", "conformance", *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    assert run(f"{HERE}:Plateau", "width=0.3") == 0
    out = capsys.readouterr().out
    assert all(law in out for law in OBJECTIVE_LAWS)
    assert f"{HERE}:Plateau: 15 held, 0 broken, 2 do not apply" in out
    assert run(f"{HERE}:WrongSlope") == 1
    assert (
        "slope_is_the_derivative (support.own_objectives:WrongSlope): A = 1, log r = [0.1]" in capsys.readouterr().out
    )
    assert run(f"{HERE}:Plateau", "widht=0.3") == 2
    assert "did you mean 'width'?" in capsys.readouterr().err


def test_a_page_on_a_class_has_the_laws_of_objectives() -> None:
    report = judge_function(f"{HERE}:Plateau", objective="sapo", normalizer=None, hyper={})
    page = markdown([report], "sapo conformance mine")
    assert all(f"- `{law}`: Require" in page and f"| `{law}` | " in page for law in {**OBJECTIVE_LAWS, **LAWS})


def test_the_example_in_the_docs_obeys_every_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    (tmp_path / "objective_of_the_docs.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    found = judge_objective("objective_of_the_docs:Plateau", {"width": 0.3})
    assert [str(v) for v in found.verdicts if v.status == BROKEN] == []
    named = {name for name in {**OBJECTIVE_LAWS, **LAWS} if f"`{name}`" in page}
    # `padding_*` stands for both.
    assert {*OBJECTIVE_LAWS, *LAWS} - named == {"padding_is_not_read", "padding_adds_nothing"}
