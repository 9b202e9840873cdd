"""A loss of the user's own, `sapo conformance`, its exit codes, and the page it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sapo import cli
from sapo.conformance import BROKEN, DOES_NOT_APPLY, LAWS, function_subject, judge, own_subjects
from sapo.conformance.peers import FAMILIES, Family
from sapo.conformance.report import counterexamples, judge_family, judge_function, markdown
from sapo.errors import ConfigError
from sapo.objectives import OBJECTIVES

OWN_LOSSES = '''
from sapo.objectives import policy_loss


def careful(logp_BT, logp_old_BT, advantages_B, mask_BT, *, num_sequences, num_tokens, tau_pos=1.0, tau_neg=1.05):
    counts = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    return policy_loss(
        "sapo", logp_BT, logp_old_BT, advantages_B, mask_BT, tau_pos=tau_pos, tau_neg=tau_neg, **counts
    ), {"a": "metric"}


def careless(logp, old, advantages, mask):
    """SAPO without a bound on the ratio; its padding is multiplied by 0."""
    value = 4 * ((logp - old).exp() - 1).sigmoid() * advantages[:, None]
    return -((value * mask).sum(1) / mask.sum(1)).mean()

'''
BREAKS = "import no_such_module_at_all\n"


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with losses of a user's, importable."""
    (tmp_path / "losses_of_a_test.py").write_text(OWN_LOSSES)
    (tmp_path / "breaks_on_import.py").write_text(BREAKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "losses_of_a_test", raising=False)
    return "losses_of_a_test"


def test_a_users_loss_that_is_right_obeys_every_law(losses: str) -> None:
    verdicts = judge(function_subject(f"{losses}:careful"))
    assert [v for v in verdicts if v.status == BROKEN] == []
    assert [v for v in verdicts if v.status == DOES_NOT_APPLY] == []


def test_settings_reach_the_loss_and_the_objective_it_is_held_against(losses: str) -> None:
    subject = function_subject(f"{losses}:careful", hyper={"tau_pos": 3.0})
    assert subject.objective.tau_pos == 3.0  # type: ignore[attr-defined]
    law = "gradient_is_the_papers"
    assert LAWS[law](subject).status != BROKEN
    # Built in, 1.05 is not what 9 would give.
    assert LAWS[law](function_subject(f"{losses}:careless", hyper={"tau_neg": 9.0})).status == BROKEN


def test_a_users_careless_loss_is_told_what_breaks_it(losses: str) -> None:
    report = judge_function(f"{losses}:careless", objective="sapo", normalizer=None, hyper={})
    verdicts = {v.law: v for v in report.verdicts[0]}
    assert {law for law, v in verdicts.items() if v.status == BROKEN} == {
        "gradient_is_the_papers",  # tau_neg is 1 there and not 1.05
        "finite_far_off_policy",
        "no_gradient_without_advantage",
        "padding_is_not_read",
        "an_empty_response_counts",
        "no_tokens_no_gradient",
    }
    assert verdicts["equal_microbatches_add_up"].detail == (
        "it takes none of num_sequences, num_tokens and num_microbatches"
    )
    assert verdicts["refuses_a_temperature_of_zero_or_less"].detail == "its temperature cannot be set"
    assert any("finite_far_off_policy" in line and "A = 1, log r = [89]" in line for line in counterexamples(report))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (
            "no_such_module:loss",
            {},
            "loss 'no_such_module:loss': importing .* failed: ModuleNotFoundError: .*; run from",
        ),
        ("losses_of_a_test:carefull", {}, "losses_of_a_test.py has no function 'carefull'; did you mean 'careful'"),
        ("breaks_on_import:loss", {}, "importing 'breaks_on_import' failed: .*no_such_module_at_all"),
        ("losses_of_a_test:careful", {"objective": "spao"}, "objective must be one of .*; got 'spao'"),
        ("losses_of_a_test:careful", {"hyper": {"eps_low": 0.2}}, "hyperparameter of sapo must be one of"),
        ("losses_of_a_test:careful", {"normalizer": "mean"}, "normalizer must be one of sequence_mean, .*; got 'mean'"),
    ],
)
def test_a_loss_that_cannot_be_judged_is_refused_in_one_line(losses, path, options, message) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        function_subject(path, **options)
    assert "\n" not in str(error.value)


def test_a_neighbour_that_is_not_installed_is_named_with_the_command_that_adds_it() -> None:
    family = Family("ghost", "no-such-package-at-all", "pip install ghost", list)
    with pytest.raises(ConfigError, match=r"^no-such-package-at-all is not installed; pip install ghost$"):
        family.load()


def test_a_neighbour_that_does_not_import_is_told_apart_from_one_that_is_missing() -> None:
    def broken():
        raise ImportError("cannot import name 'x'")

    family = Family("pytest", "pytest", "pip install pytest", broken)
    with pytest.raises(ConfigError, match=r"^pytest \S+ does not import here: cannot import name 'x'; pip install"):
        family.load()


def run(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["sapo", "conformance", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_exit_code_is_one_for_a_broken_loss_of_ones_own_and_zero_for_a_neighbours(
    losses: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{losses}:careful", "tau_pos=2.0", monkeypatch=monkeypatch) == 0
    assert run(f"{losses}:careless", monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out
    assert "finite_far_off_policy (losses_of_a_test:careless): A = 1, log r = [89]: the gradient is nan" in out
    pytest.importorskip("trl")
    assert run("trl", monkeypatch=monkeypatch) == 0
    assert "broken" in capsys.readouterr().out


def test_a_mistake_in_the_call_is_exit_code_two_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("tlr", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == (
        "sapo: a subject is one of sapo, trl, liger, verl, module:function or module:Class; "
        "got 'tlr'; did you mean 'trl'?\n"
    )


def test_the_page_has_versions_laws_tables_and_counterexamples(losses: str) -> None:
    report = judge_function(f"{losses}:careless", objective="sapo", normalizer=None, hyper={})
    page = markdown([report], "sapo conformance mine:careless")
    assert "Written by `sapo conformance mine:careless` on 20" in page
    assert all(f"- `{law}`: " in page and f"| `{law}` | " in page for law in LAWS)
    assert "| `finite_far_off_policy` | **broken** |" in page
    assert "| `equal_microbatches_add_up` | – |" in page
    assert "- finite_far_off_policy (losses_of_a_test:careless): A = 1, log r = [89]" in page


def test_the_page_in_docs_is_of_these_laws_and_losses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    assert all(f"- `{name}`: {' '.join((law.__doc__ or '').split())}" in page for name, law in LAWS.items())
    assert all(f"| {name} | `" in page for name in OBJECTIVES), "run the command at its head again"
    assert "No law is broken." in page


def test_a_family_is_judged_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(FAMILIES) == ["sapo", "trl", "liger", "verl"]
    assert [s.name for s in FAMILIES["sapo"].load()] == list(OBJECTIVES)
    two = Family("sapo", "sapo-rl", "", lambda: own_subjects(["cispo", "gmpo"]))
    monkeypatch.setitem(FAMILIES, "sapo", two)
    report = judge_family("sapo")
    assert report.names() == ["cispo", "gmpo"]
    assert report.broken == 0
    assert report.ours
