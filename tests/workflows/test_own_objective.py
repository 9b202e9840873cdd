"""An objective of a user's own, `objective.name: module:Class`, through a whole run: judged first, trained by, resumed,
compared, shown. One that breaks a law is refused before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sapo
from sapo.config.recipes import parse_recipe
from sapo.errors import ConfigError
from sapo.report.arms import group_runs
from sapo.report.gates import objective_of
from sapo.report.runs import read_run
from sapo.run.directory import RunDirectory
from sapo.workflows.comparing.config import load_comparison
from sapo.workflows.train import resume
from support.commands import call
from support.runs import fingerprint, metrics, write_recipe

HERE = "support.own_objectives"
PLATEAU = {"name": f"{HERE}:Plateau", "width": 0.02}
SHORT = {"train__steps": 4, "train__learning_rate": 1e-2, "eval__every": 4, "log__rollouts_every": 1}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "whole"))


def recipe(directory: Path, objective: dict[str, Any], **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return write_recipe(directory, **{**SHORT, "objective": objective, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run by a user's objective, with a counterfactual of theirs too."""
    directory = tmp_path_factory.mktemp("trained") / "whole"
    counterfactuals = [{"name": "sapo"}, {"name": f"{HERE}:HalfOpen"}, {"name": f"{HERE}:Plateau", "label": "wide"}]
    file = recipe(directory, PLATEAU, diagnostics={"counterfactuals": counterfactuals, "counterfactuals_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        return sapo.train(sapo.load_recipe(file)).directory


def test_its_own_settings_reach_the_run_and_config_yaml(trained: Path) -> None:
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written["objective"]["name"] == f"{HERE}:Plateau"
    assert written["objective"]["width"] == 0.02
    assert (written["objective"]["normalizer"], written["objective"]["advantage"]) == ("token_mean", "group_mean")
    assert written["provenance"]["objective"] == "plateau"
    updates = [m for m in metrics(trained) if m["kind"] == "update"]
    assert any(m.get("gate/eur", 1.0) < 1 for m in updates), "its gate never closed: nothing is shown"


def test_a_counterfactual_of_a_users_is_named_by_its_class_or_label(trained: Path) -> None:
    first = next(m for m in metrics(trained) if m["kind"] == "update" and "counterfactual/sapo/eur" in m)
    # HalfOpen weighs every token half of what Plateau does at the same width, 0.2, and on policy that is 1.
    assert first["counterfactual/half_open/eur"] == pytest.approx(0.5)
    assert first["counterfactual/wide/eur"] == pytest.approx(1.0)


def test_the_gate_that_trained_is_the_classs(trained: Path, tmp_path: Path) -> None:
    """The same run by GRPO has other weights; by Plateau again, the same."""
    file = recipe(tmp_path / "whole", PLATEAU, diagnostics={"counterfactuals": []})
    again = sapo.train(sapo.load_recipe(file)).directory
    name = "model.safetensors"
    assert fingerprint(again, 4)[name] == fingerprint(trained, 4)[name]
    grpo = {"name": "grpo", "normalizer": "token_mean", "advantage": "group_mean"}
    other = sapo.train(sapo.load_recipe(recipe(tmp_path / "grpo", grpo))).directory
    assert fingerprint(other, 4)[name] != fingerprint(trained, 4)[name]


@pytest.mark.parametrize("asked", [15, 40])
def test_a_run_by_it_resumes_to_the_bit(trained: Path, tmp_path: Path, asked: int) -> None:
    counterfactuals = [{"name": "sapo"}, {"name": f"{HERE}:HalfOpen"}, {"name": f"{HERE}:Plateau", "label": "wide"}]
    diagnostics = {"counterfactuals": counterfactuals, "counterfactuals_every": 1}
    file = recipe(tmp_path / "whole", PLATEAU, diagnostics=diagnostics)
    count = iter(range(10**6))
    stopped = sapo.train(sapo.load_recipe(file), should_stop=lambda: next(count) >= asked).directory
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 4) == fingerprint(trained, 4)


def test_a_class_with_a_wrong_slope_is_refused_by_the_laws_name_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path / "whole", {"name": f"{HERE}:WrongSlope"})
    before = sorted(tmp_path.rglob("*"))
    assert call("train", str(file)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(
        f"sapo: objective {HERE}:WrongSlope breaks the law slope_is_the_derivative: A = 1, log r = [0.1]: the slope of "
        "token 1 is 1, the derivative of the value 1.10517; correct WrongSlope"
    )
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)) == before


def test_a_counterfactual_that_breaks_a_law_is_refused_as_well(tmp_path: Path) -> None:
    diagnostics = {"counterfactuals": [{"name": f"{HERE}:WrongSlope"}]}
    config = sapo.load_recipe(recipe(tmp_path / "whole", PLATEAU, diagnostics=diagnostics))
    with pytest.raises(ConfigError, match="WrongSlope breaks the law slope_is_the_derivative"):
        sapo.train(config)
    assert not Path(str(config.run_dir)).exists()


def test_a_law_of_design_that_is_broken_is_a_warning(tmp_path: Path) -> None:
    class Recorder:
        warnings: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

        def warning(self, text: str) -> None:
            self.warnings.append(text)

    file = recipe(tmp_path / "whole", {"name": f"{HERE}:HalfOpen"}, train__steps=1)
    sapo.train(sapo.load_recipe(file), listener=Recorder())
    assert [w for w in Recorder.warnings if "breaks the law weight_is_one_on_policy: A = 1, log r = [0]" in w]


@pytest.mark.parametrize(
    ("objective", "code", "shown"),
    [
        (PLATEAU, 0, ["Plateau(width=0.02), by the laws", "  held: surrogate_is_per_token", "nothing was written"]),
        (
            {"name": f"{HERE}:HalfOpen"},
            0,
            ["  broken, a matter of design: weight_is_one_on_policy: A = 1, log r = [0]"],
        ),
        ({"name": f"{HERE}:WrongSlope"}, 2, ["  broken: slope_is_the_derivative: A = 1, log r = [0.1]"]),
    ],
)
def test_a_dry_run_prints_every_law(objective, code, shown, tmp_path, capsys) -> None:
    file = recipe(tmp_path / "whole", objective)
    assert call("train", str(file), "--dry-run") == code
    out = capsys.readouterr().out
    assert all(line in out for line in shown), out
    assert "  does not apply: gradient_is_the_papers (" in out
    assert not (tmp_path / "whole" / "run").exists()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": f"{HERE}:Plateau", "widht": 0.3}, r"^objective: hyperparameter of .*; did you mean 'width'\?$"),
        ({"name": f"{HERE}:Plateau", "width": 3}, r"^objective: width must lie in \(0, 1\); got 3"),
        ({"name": f"{HERE}:Plateu"}, r"^objective: objective .* has no class 'Plateu'; did you mean 'Plateau'\?$"),
        ({"name": f"{HERE}:HiddenByTheRecipe"}, "must not be called .*, which are keys of the recipe; got kl"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_recipe_is_read(tmp_path: Path, objective, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sapo.load_recipe(recipe(tmp_path / "whole", objective))


def test_another_objective_on_the_command_line_leaves_its_settings_behind(tmp_path: Path, trained: Path) -> None:
    config = sapo.load_recipe(trained / "config.yaml", ["objective.name=grpo", "run_dir=x"])
    assert config.objective.hyperparameters == {}
    assert (config.objective.normalizer, config.objective.advantage) == ("sequence_mean", "group_std")
    back = sapo.load_recipe(recipe(tmp_path / "whole", {"name": "sapo"}), [f"objective.name={HERE}:Plateau"])
    assert (back.objective.normalizer, back.objective.advantage) == ("token_mean", "group_mean")


def test_a_run_can_be_read_where_its_module_is_not_and_only_resumed_where_it_is(trained: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    settings["objective"]["name"] = "module_of_a_stranger:Gate"
    settings["diagnostics"]["counterfactuals"][1]["name"] = "module_of_a_stranger:Other"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    read = RunDirectory.read_config(run)
    assert read.objective_name == "plateau"
    assert [c.key for c in read.diagnostics.counterfactuals] == ["sapo", "half_open", "wide"]
    with pytest.raises(ConfigError, match="importing 'module_of_a_stranger' failed"):
        resume(run)
    with pytest.raises(ConfigError, match="importing 'module_of_a_stranger' failed"):
        parse_recipe(settings)


def test_the_report_names_it_by_its_class_and_imports_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, None)  # an import of it would fail
    (arm,) = group_runs([read_run(trained, "run")])
    assert arm.label == "plateau"
    assert objective_of(arm.objective) is None


def test_it_is_an_arm_of_a_comparison_by_its_own_name(tmp_path: Path) -> None:
    file = recipe(tmp_path / "whole", {"name": "sapo"})
    plan = load_comparison(file, objectives=["sapo", f"{HERE}:Plateau"], learning_rates=[1e-3], seeds=[0])
    assert [run.name for run in plan.runs(Path("c"))] == ["sapo-lr1e-3-seed0", "plateau-lr1e-3-seed0"]
    assert plan.runs(Path("c"))[1].config.objective.normalizer == "token_mean"
    with pytest.raises(ConfigError, match="did you mean 'Plateau'"):
        load_comparison(file, objectives=[f"{HERE}:Plateu"], learning_rates=[1e-3], seeds=[0])
    broken = load_comparison(file, objectives=[f"{HERE}:WrongSlope"], learning_rates=[1e-3], seeds=[0])
    with pytest.raises(ConfigError, match="breaks the law slope_is_the_derivative"):
        sapo.compare(broken, tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()
