"""Recipes: defaults, overrides, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sapo.config import RunConfig
from sapo.config.recipes import known_recipes, load_recipe, override_run, parse_recipe
from sapo.errors import ConfigError

MINIMAL = {"model": {"path": "m"}, "tasks": [{"name": "arithmetic"}], "train": {"steps": 1}}


def changed(**changes: object) -> dict:
    """MINIMAL with dotted keys set; `__` stands for a dot."""
    settings = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return settings


def test_every_shipped_recipe_is_valid_and_names_itself() -> None:
    assert {"quickstart", "moe_quickstart", "vision_quickstart"} <= set(known_recipes())
    for name in known_recipes():
        assert load_recipe(name).run_dir == f"runs/{name}"


def test_the_quickstart_recipe_is_the_papers_sapo() -> None:
    config = load_recipe("quickstart")
    assert config.objective.name == "sapo"
    assert config.objective.hyperparameters == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert config.objective.normalizer == "sequence_mean"
    assert config.train.minibatches == 4


def test_overrides_reach_nested_keys_lists_and_numbers_in_scientific_notation() -> None:
    overrides = ["train.learning_rate=3e-5", "tasks.0.digits=3", "eval.k=[1,2]", "seed=7"]
    config = load_recipe("quickstart", overrides)
    assert config.train.learning_rate == 3e-5
    assert config.tasks[0].options["digits"] == 3
    assert config.eval.k == [1, 2]
    assert config.seed == 7


def test_another_objective_drops_the_settings_of_the_recipes_own() -> None:
    config = load_recipe("quickstart", ["objective.name=grpo", "objective.eps_low=0.1"])
    assert config.objective.name == "grpo"
    assert config.objective.hyperparameters == {"eps_low": 0.1}


def test_an_objective_brings_the_normalizer_and_advantage_of_its_source_unless_others_are_given() -> None:
    for objective, normalizer, advantage in (
        ({}, "sequence_mean", "group_std"),
        ({"name": "dapo"}, "token_mean", "group_std"),
        ({"name": "rloo"}, "sequence_sum", "leave_one_out"),
        ({"name": "dr_grpo", "normalizer": "token_mean"}, "token_mean", "group_mean"),
        ({"name": "minirl", "advantage": "group_std"}, "sequence_sum", "group_std"),
    ):
        config = parse_recipe({**MINIMAL, "objective": objective})
        assert (config.objective.normalizer, config.objective.advantage) == (normalizer, advantage)


def test_another_objective_on_a_runs_own_config_is_that_of_its_source_and_keeps_what_was_chosen(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"

    def changed_to(name: str, *first: str) -> dict:
        run = load_recipe("quickstart", ["objective.kl={coefficient: 0.1}", *first])
        file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
        return load_recipe(file, [f"objective.name={name}"]).objective.model_dump()

    kl = {"coefficient": 0.1, "estimator": "k3", "reference": None}
    dapo = {
        "name": "dapo",
        "normalizer": "token_mean",
        "advantage": "group_std",
        "kl": kl,
        "tis": None,
    }  # DAPO, equation 8
    assert changed_to("dapo") == dapo
    rloo = {"name": "rloo", "normalizer": "sequence_sum", "advantage": "leave_one_out", "kl": kl, "tis": None}
    assert changed_to("rloo") == rloo
    chosen = ["objective.normalizer=constant_length", "objective.advantage=group_mean"]  # neither is SAPO's
    assert changed_to("dapo", *chosen) == {**dapo, "normalizer": "constant_length", "advantage": "group_mean"}


def test_a_written_config_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    config = load_recipe("quickstart", ["objective.gate=erf"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_recipe(file) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (changed(trian={}), "unknown key trian; did you mean train?"),
        (changed(train__leraning_rate=1), "unknown key train.leraning_rate; did you mean train.learning_rate?"),
        (changed(model__coldstart={"hiden_size": 8}), "unknown key model.coldstart.hiden_size; did you mean"),
        (changed(objective={"name": "sapo", "tau_neg": -1}), "tau_neg must be positive"),
        (changed(objective={"name": "sapoo"}), "did you mean 'sapo'?"),
        (changed(objective={"name": "sapo", "eps_low": 0.2}), "eps_low"),
        (changed(objective={"name": "sapo", "normalizer": "token"}), "did you mean token_mean?"),
        (changed(train={}), "train.steps is required and has no default"),
        (changed(train__steps=0), "train.steps: input should be greater than or equal to 1; got 0"),
        (changed(train__minibatches=5), "must be a multiple of train.minibatches; got 32 and 5; use 35 prompts"),
        (changed(train__betas=[0.9, 1.0]), "betas must lie in [0, 1)"),
        (changed(train__learning_rate=float("nan")), "train.learning_rate"),
        (
            changed(model={}),
            "give model.path or model.coldstart, exactly one of them; got neither; set the other to null",
        ),
        (changed(model__coldstart={}), "exactly one of them; got both"),
        (changed(model={"coldstart": {"heads": 3}}), "hidden_size must be an even multiple of heads; got 64 and 3"),
        (
            changed(model={"coldstart": {}, "revision": "main"}),
            "model: revision is for hub repositories; got 'main' with a cold start; leave it out",
        ),
        (
            changed(model={"coldstart": {}, "trust_remote_code": True}),
            "model: trust_remote_code is for models of directories and hub repositories; got true with a cold start",
        ),
        (
            changed(model={"path": "dir/m.gguf", "revision": "v1"}),
            "model: revision is for hub repositories; got 'v1' with dir/m.gguf; leave it out",
        ),
        (
            changed(model={"path": "package:a/m.gguf", "trust_remote_code": True}),
            "got true with package:a/m.gguf; leave it out",
        ),
        (changed(eval__k=[1, 8]), "every k must lie in 1..samples (4); got [1, 8]"),
        (changed(rollout__samples_per_prompt=1), "rollout.samples_per_prompt"),
        (changed(rollout__zero_variance="skip"), "rollout.zero_variance: input should be 'keep', 'drop' or 'refill'"),
        (changed(rollout__max_refills=2), "max_refills is for zero_variance=refill; got 2 with keep; leave it out"),
        (
            changed(rollout={"zero_variance": "refill", "max_refills": 0}),
            "rollout.max_refills: input should be greater",
        ),
        (changed(rollout={"zero_variance": "refill", "samples_per_prompt": 1}), "rollout.samples_per_prompt"),
        (changed(rollout__overlong_buffer=8), "overlong_buffer is for overlong=penalty; got 8 with zero; leave it out"),
        (
            changed(rollout__overlong="penalty"),
            "an overlong_buffer of 1..63 tokens, less than max_new_tokens; got None",
        ),
        (
            changed(rollout={"overlong": "penalty", "overlong_buffer": 64}),
            "less than max_new_tokens; got 64; DAPO takes",
        ),
        (changed(curriculum={"low": 0.8, "high": 0.2}), "curriculum: low must not exceed high; got 0.8 and 0.2"),
        (changed(curriculum={"outside": 0}), "curriculum.outside: input should be greater than 0; got 0"),
        (changed(curriculum={"hgih": 0.5}), "unknown key curriculum.hgih; did you mean curriculum.high?"),
        (changed(tasks=[{"name": "file", "path": "x", "curriculum": {"memory": 1}}]), "tasks.0.curriculum.memory"),
        (changed(tasks=[]), "tasks"),
        (changed(tasks=[{"name": "arithmetic", "weight": -1}]), "tasks.0.weight"),
    ],
)
def test_a_mistake_is_one_line_with_key_rule_and_way_out(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_two_mistakes_are_two_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(changed(train__stepz=1, sed=3))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "must hold a mapping of settings; got list"),
        ("", "must hold a mapping of settings; got NoneType"),
        ("train: {steps: ${nowhere}}", "nowhere"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load_recipe("quikstart")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe("quickstart", [override])


def test_a_resumed_run_may_go_on_longer_but_not_become_another() -> None:
    config = load_recipe("quickstart")
    assert override_run(config, ["train.steps=300", "checkpoint.keep=5"]).train.steps == 300
    with pytest.raises(ConfigError, match=r"objective\.tau_pos cannot change when a run is resumed"):
        override_run(config, ["objective.tau_pos=2"])


def test_the_batch_sentence_does_the_sums() -> None:
    assert parse_recipe(changed(train__steps=3)).batch_sentence() == (
        "Each step draws 8 completions of 32 prompts (256 sequences) and makes 4 updates of 8 prompts (64 sequences) "
        "each; 3 steps make 12 updates."
    )


def test_the_batch_sentence_counts_one_in_the_singular() -> None:
    single = changed(train={"steps": 1, "minibatches": 2}, rollout__prompts_per_step=2)
    assert parse_recipe(single).batch_sentence() == (
        "Each step draws 8 completions of 2 prompts (16 sequences) and makes 2 updates of 1 prompt (8 sequences) "
        "each; 1 step makes 2 updates."
    )


def test_the_batch_sentence_says_what_becomes_of_zero_variance_groups() -> None:
    assert (
        parse_recipe(changed(rollout__zero_variance="drop"))
        .batch_sentence()
        .endswith("1 step makes 4 updates. Zero-variance groups leave the batch, so updates may be smaller.")
    )
    assert (
        parse_recipe(changed(rollout={"zero_variance": "refill", "max_refills": 1}))
        .batch_sentence()
        .endswith("replaced by groups of further prompts, in up to 1 more round of sampling.")
    )


def test_every_field_is_documented_beside_it() -> None:
    def undocumented(model: type, path: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            annotations = [field.annotation, *getattr(field.annotation, "__args__", ())]
            nested = [a for a in annotations if isinstance(a, type) and hasattr(a, "model_fields")]
            for section in nested:
                missing += undocumented(section, f"{path}{name}.")
            if not nested and not field.description:
                missing.append(path + name)
        return missing

    assert undocumented(RunConfig) == []


@pytest.mark.parametrize("key", ["load_in_4bit", "lora.bits", "quantization_config.load_in_4bit"])
def test_a_base_in_few_bits_is_refused_in_one_line_that_names_the_way_out(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.\S+: a base of 4 or 8 bits .* model\.dtype=bfloat16") as refused:
        load_recipe("smollm2_sums_lora", [f"model.{key}=4"])
    assert "\n" not in str(refused.value)
