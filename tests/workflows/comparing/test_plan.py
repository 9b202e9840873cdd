"""What a comparison consists of: recipes, options, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo.config.recipes import known_comparisons, known_recipes, load_recipe
from sapo.errors import ConfigError
from sapo.workflows.comparing import load_comparison
from sapo.workflows.comparing.directory import ComparisonDirectory, check_directory
from sapo.workflows.comparing.plan import SHARED_KEYS

COMPARISON = {
    "recipe": "quickstart",
    "settings": {"train": {"steps": 7}, "rollout.prompts_per_step": 4},
    "arms": {
        "soft": {"objective": {"name": "sapo", "tau_neg": 2.0}},
        "hard": {"objective.name": "grpo", "objective.eps_low": 0.1},
    },
    "learning_rates": [1e-4, 3e-4],
    "seeds": [5, 8],
    "baseline": "hard",
    "quick": {"settings": {"train.steps": 2}, "learning_rates": [3e-4], "seeds": 1},
}


def write(directory: Path, **changes: Any) -> Path:
    """The comparison above, with keys changed, or left out by None."""
    file = directory / "mine.yaml"
    settings = {**COMPARISON, **changes}
    file.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False))
    return file


def test_each_arm_is_run_at_each_rate_and_seed_on_what_all_share(tmp_path: Path) -> None:
    runs = load_comparison(write(tmp_path)).runs(tmp_path)
    assert [r.name for r in runs] == [
        f"{arm}-lr{rate}-seed{seed}" for seed in (5, 8) for rate in ("1e-4", "3e-4") for arm in ("soft", "hard")
    ]
    for run in runs:
        config = run.config
        assert (config.seed, config.train.learning_rate) == (run.seed, run.learning_rate)
        assert (config.train.steps, config.rollout.prompts_per_step, config.threads) == (7, 4, 1)
        assert config.run_dir == str(tmp_path / "runs" / run.name)
        hyper = {"tau_pos": 1.0, "tau_neg": 2.0} if run.arm == "soft" else {"eps_low": 0.1}
        assert config.objective.hyperparameters == hyper, "of the recipe's objective an arm of another has nothing"


def test_seeds_are_counted_from_the_recipes_own(tmp_path: Path) -> None:
    recipe = {**yaml.safe_load(known_recipes()["quickstart"].read_text()), "seed": 40}
    assert load_comparison(write(tmp_path, recipe=recipe, seeds=3)).seeds == (40, 41, 42)


def test_a_recipe_of_one_run_becomes_a_comparison_by_options() -> None:
    plan = load_comparison("quickstart", ["train.steps=9"], objectives=["gspo", "sapo"], seeds=2)
    runs = plan.runs(Path("c"))
    assert [r.name for r in runs] == [f"{a}-lr1e-4-seed{s}" for s in (0, 1) for a in ("gspo", "sapo")]
    assert {r.config.train.steps for r in runs} == {9}
    assert runs[0].config.objective.hyperparameters == {}
    assert runs[1].config.objective.hyperparameters == {"tau_pos": 1.0, "tau_neg": 1.05}, "the recipe's own objective"
    assert plan.baseline == "gspo"
    assert list(load_comparison("quickstart").arms) == ["sapo", "gspo", "grpo"]


def test_options_take_the_place_of_the_recipes(tmp_path: Path) -> None:
    plan = load_comparison(write(tmp_path), arms=["soft"], learning_rates=[1e-5], seeds=[3], quick=False)
    assert (list(plan.arms), plan.learning_rates, plan.seeds) == (["soft"], (1e-5,), (3,))
    assert plan.baseline == "soft", "the baseline was left out: the first arm that remains takes its place"


def test_quick_is_the_recipes_small_form_or_a_default_one(tmp_path: Path) -> None:
    plan = load_comparison(write(tmp_path), quick=True)
    assert (plan.name, plan.base.train.steps, plan.learning_rates, plan.seeds) == ("mine-quick", 2, (3e-4,), (0,))
    plan = load_comparison(write(tmp_path, quick=None, settings={"train.steps": 50}), quick=True)
    assert (plan.base.train.steps, plan.base.eval.problems, plan.learning_rates, plan.seeds) == (
        20,
        64,
        (1e-4,),
        (0, 1),
    )
    plan = load_comparison(write(tmp_path), ["train.steps=4"], learning_rates=[1e-3], quick=True)
    assert (plan.base.train.steps, plan.learning_rates) == (4, (1e-3,)), "what is said aloud goes before the small form"


def test_the_resolved_comparison_is_a_recipe_of_the_same_comparison(tmp_path: Path) -> None:
    plan = load_comparison(write(tmp_path))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "comparison.yaml").write_text(yaml.safe_dump(plan.to_json(), sort_keys=False))
    again = load_comparison(tmp_path / "begun")
    assert again.name == "begun"
    assert again.to_json() == plan.to_json()
    assert [r.config for r in again.runs(tmp_path)] == [r.config for r in plan.runs(tmp_path)]


def test_shipped_comparisons_are_told_from_recipes_of_one_run() -> None:
    assert {"paper_fig4", "paper_fig5", "paper_fig6", "paper_fig23"} <= set(known_comparisons())
    assert not set(known_comparisons()) & set(known_recipes())


@pytest.mark.parametrize("name", known_comparisons())
def test_every_shipped_comparison_is_valid_in_full_and_quick(name: str) -> None:
    plan = load_comparison(name)
    assert len(plan.seeds) >= 3, "fewer show no more than luck"
    assert len(plan.runs(Path())) == len(plan.arms) * len(plan.learning_rates) * len(plan.seeds)
    small = load_comparison(name, quick=True)
    assert len(small.runs(Path())) * small.base.train.steps <= 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"a": {"objective": {"nam": "grpo"}}}, "baseline": None},
            "arm a: objective: hyperparameter of",
        ),
        (
            {"arms": {"a": {"objectiv.name": "grpo"}}, "baseline": None},
            "arm a: unknown key objectiv; did you mean",
        ),
        ({"arms": {"a": {"objective.name": "gropo"}}, "baseline": None}, "got 'gropo'; did you mean 'grpo'?"),
        ({"arms": {}}, "a comparison needs arms; got none"),
        ({"arms": {"a/b": {}}}, "letters, digits"),
        ({"arm": {}}, "unknown key arm; did you mean arms?"),
        ({"seeds": 0}, "a comparison needs seeds, 1 or more of them; got 0"),
        ({"seeds": []}, "a comparison needs seeds; got none"),
        ({"seeds": [1, 1]}, "seeds must differ from each other; got [1, 1]"),
        ({"seeds": [-1]}, "seeds must be 0 or more; got -1"),
        ({"learning_rates": []}, "a comparison needs learning_rates; got none"),
        ({"learning_rates": [1e-4, 1.0e-4]}, "learning_rates must differ from each other"),
        ({"learning_rates": [-1.0]}, "train.learning_rate: input should be greater than 0; got -1.0"),
        ({"baseline": "softer"}, "baseline must be one of the arms (soft, hard); got 'softer'"),
        ({"recipe": "quikstart"}, "did you mean quickstart?"),
        ({"recipe": "paper_fig5"}, "is a comparison; name its own recipe"),
        ({"settings": {"seed": 3}}, "seed is set run by run"),
        ({"settings": {"train.lerning_rate": 3}}, "did you mean train.learning_rate?"),
        ({"quick": {"arms": ["softer"]}}, "unknown arm 'softer'"),
    ],
)
def test_a_mistake_in_a_comparison_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_comparison(write(tmp_path, **changes), quick="quick" in changes)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", [*SHARED_KEYS, "tasks.0.digits", "eval.samples"])
def test_an_arm_cannot_change_what_all_runs_share(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"arm a must not set {key}, which all runs of a comparison share"):
        load_comparison(write(tmp_path, arms={"a": {key: 1}}, baseline="a"))


def test_an_arm_may_sample_at_another_temperature_where_all_are_evaluated_at_one(tmp_path: Path) -> None:
    arms = {"a": {"rollout.temperature": 0.8}}
    with pytest.raises(ConfigError, match=r"arm a must not set rollout\.temperature while evaluations take theirs"):
        load_comparison(write(tmp_path, arms=arms, baseline="a"))
    plan = load_comparison(write(tmp_path, arms=arms, baseline="a"), ["eval.temperature=1.0"])
    [*_, run] = plan.runs(tmp_path)
    assert (run.config.rollout.temperature, run.config.eval.temperature) == (0.8, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["seed=1"]}, "seed is set run by run in a comparison, not for all of them; use seeds"),
        ({"overrides": ["run_dir=x"]}, "use --out"),
        ({"overrides": ["objective.tau_neg=1"]}, "arm soft has its own objective.tau_neg"),
        ({"overrides": ["objective={}"]}, "arm soft has its own objective.name"),
        ({"objectives": ["sapo"]}, "has arms; choose some by --arms"),
        ({"arms": ["softer"]}, "unknown arm 'softer'"),
        ({"baseline": "softer"}, "baseline must be one of the arms"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_comparison(write(tmp_path), **options)
    assert message in str(caught.value)


def test_a_comparison_is_no_run_and_its_recipe_says_so() -> None:
    with pytest.raises(ConfigError, match="is a comparison of runs, not a run; `sapo compare paper_fig5` makes them"):
        load_recipe("paper_fig5")


def test_the_directory_of_another_comparison_is_refused(tmp_path: Path) -> None:
    plan = load_comparison(write(tmp_path))
    begun = tmp_path / "begun"
    check_directory(begun, plan)
    begun.mkdir()
    check_directory(begun, plan)
    (begun / "comparison.yaml").write_text(yaml.safe_dump(plan.to_json(), sort_keys=False))
    check_directory(begun, plan)
    with pytest.raises(ConfigError, match=r"with seeds=\[5, 8\] where this one has \[5\]; `sapo compare"):
        check_directory(begun, load_comparison(write(tmp_path, seeds=[5])))
    arms = {**COMPARISON["arms"], "hard": {"objective.name": "grpo", "objective.eps_low": 0.3}}
    other = load_comparison(write(tmp_path, arms=arms))
    with pytest.raises(ConfigError, match=r"with arms\.hard\.objective\.eps_low=0\.1 where this one has 0\.3"):
        check_directory(begun, other)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no comparison but precious\.txt"):
        check_directory(stranger, plan)


@pytest.mark.parametrize(
    "more",
    [
        {"seeds": [8, 3, 5]},
        {"learning_rates": [3e-4, 1e-5, 1e-4]},
        {"arms": {**COMPARISON["arms"], "third": {"objective.name": "gspo"}}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_comparison_may_grow_but_not_shrink_or_change(tmp_path: Path, more: dict[str, Any]) -> None:
    small, large = load_comparison(write(tmp_path)), load_comparison(write(tmp_path, **more))
    begun = tmp_path / "begun"
    ComparisonDirectory.open(begun, small).close()
    (begun / "results.json").write_text("{}")
    ComparisonDirectory.open(begun, small).close()
    assert (begun / "results.json").exists()
    ComparisonDirectory.open(begun, large).close()
    assert not (begun / "results.json").exists(), "a report would take it for that of the whole"
    assert load_comparison(begun).to_json() == large.to_json(), "as a comparison of its own it goes on with all of it"
    with pytest.raises(ConfigError, match="holds another comparison"):
        check_directory(begun, small)
    changed = load_comparison(write(tmp_path, **more, settings={**COMPARISON["settings"], "train": {"steps": 8}}))
    with pytest.raises(ConfigError, match=r"with recipe\.train\.steps=7 where this one has 8"):
        check_directory(begun, changed)
    beginning = tmp_path / "beginning"
    ComparisonDirectory.open(beginning, small).close()
    with pytest.raises(ConfigError, match=r"with baseline=\"hard\" where this one has \"soft\""):
        check_directory(beginning, load_comparison(write(tmp_path, **more, baseline="soft")))
