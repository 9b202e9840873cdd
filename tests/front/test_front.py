"""The Python front door: objects of Python become a run, and a run gives tables; wrong calls are one clear line."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import sapo
from sapo.errors import ConfigError, ModelError, TaskError
from sapo.front.callbacks import Callbacks
from sapo.front.given.models import _digest_of_model
from sapo.front.given.rewards import importable_name, verifier_settings
from sapo.front.given.rows import write_rows
from sapo.front.train import make_config
from sapo.tasks.verifiers import in_process
from support.runs import write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of examples/own_everything.py: model object, rows in memory, two rewards, a callback that stops."""
    directory = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("SAPO_CACHE", str(directory / "cache"))
        yield runpy.run_path(str(ROOT / "examples" / "own_everything.py"))


def test_the_ten_lines_train_until_the_callback_stops_the_run(own: Any) -> None:
    run = own["run"]
    assert run.stopped is not None
    table = run.metrics()
    assert table["reward/mean"].iloc[-1] > 0.3, "the callback asks to stop above this"
    assert (table["reward/mean"].iloc[:-1] <= 0.3).all(), "and no earlier step did"
    assert table["reward/mean"].iloc[-1] > 2 * table["reward/mean"].iloc[0]
    assert list(table["step"]) == list(range(1, len(table) + 1))
    assert run.stopped.checkpoint.step == len(table)


def test_samples_are_a_table_with_the_reward_of_each_term(own: Any) -> None:
    samples = own["run"].samples(1)
    assert len(samples) == 4 * 8, "prompts_per_step x samples_per_prompt"
    first = samples.iloc[0]
    # By hand, from the two functions of the script.
    share, brevity = first["text"].count("7") / 8, 1 - len(first["text"]) / 12
    assert first["reward"] == pytest.approx(0.9 * share + 0.1 * brevity)
    assert first["figures"] == pytest.approx({"share": share, "reward": brevity}), "a lambda has no name"
    assert "token_ids" not in samples
    with pytest.raises(ConfigError, match=r"step must be one whose completions were logged: 1.*; got 2"):
        own["run"].samples(2)
    with pytest.raises(ConfigError, match=r"kind must be one of .*; got 'stepp'; did you mean 'step'\?"):
        own["run"].metrics("stepp")


def test_the_report_is_shown_inline(own: Any) -> None:
    report = own["run"].report()
    assert report.path == own["run"].directory / "report.html"
    shown = report._repr_html_()
    assert shown.startswith("<iframe")
    assert "runs/own" in own["run"]._repr_html_()


def test_a_run_of_functions_is_resumed_where_they_are_and_refused_in_one_line_where_not(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = own["run"]
    monkeypatch.setattr(in_process, "_functions", {})
    monkeypatch.setattr(in_process, "_fingerprints", {})
    with pytest.raises(TaskError, match=r"'share' was one of the Python session that began the run") as caught:
        sapo.resume(run, progress=False)
    assert "\n" not in str(caught.value)
    steps = run.stopped.checkpoint.step + 1
    rewards = [(own["share"], 0.9), (own["brevity"], 0.1)]
    seen: list[int] = []
    done = sapo.resume(
        run, rewards=rewards, train__steps=steps, progress=False, callbacks=lambda step, _: seen.append(step)
    )
    assert done.stopped is None
    assert seen == [steps]
    assert len(done.metrics()) == steps


def test_a_run_keeps_its_own_lambda_when_another_is_given_and_refuses_a_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    settings: dict[str, Any] = {
        **{"model": str(write_model(tmp_path / "model")), "rows": [{"prompt": f"{i}+1="} for i in range(4)]},
        **{"tasks": {"score_truncated": True, "held_out_fraction": 0.25}, "max_new_tokens": 2, "progress": False},
        **{"steps": 1, "minibatches": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "eval__every": 0},
    }
    sapo.train(**settings, rewards=lambda completion: 0.25, run_dir="first")
    sapo.train(**settings, rewards=lambda completion: 0.75, run_dir="second")
    assert sapo.evaluate("first", samples=1).metrics()["reward/mean"] == 0.25
    more = sapo.resume("first", steps=2, progress=False)
    assert list(more.metrics()["reward/mean"]) == [0.25, 0.25]
    other = {"rewards": lambda completion: 0.5, "steps": 3, "progress": False}
    with pytest.raises(ConfigError, match=r"changed: tasks.0.verifier.reward.*reward has other content"):
        sapo.resume("first", **other)
    assert sapo.evaluate("first", samples=1).metrics()["reward/mean"] == 0.25, "a refusal leaves the run's own"
    more = sapo.resume("first", **other, accept_changes=["tasks.0.verifier"])
    assert list(more.metrics()["reward/mean"]) == [0.25, 0.25, 0.5]


def test_a_model_and_rows_in_memory_are_evaluated_and_asked(own: Any) -> None:
    options = {"samples": 2, "max_new_tokens": 4}
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
    judged = sapo.evaluate(
        (own["model"], own["tokenizer"]), {"score_truncated": True}, rows=rows, rewards=lambda text: 0.25, **options
    )
    assert judged.metrics()["problems"] == 2, "all rows are held out"
    assert judged.metrics()["reward/mean"] == 0.25
    texts = sapo.generate((own["model"], own["tokenizer"]), ["1+1=", "2+2="], samples=3, max_new_tokens=2)
    assert [len(t) for t in texts] == [3, 3]
    assert sapo.generate(own["run"], "1+1=", temperature=0, max_new_tokens=2) == sapo.generate(
        own["run"], "1+1=", temperature=0, max_new_tokens=2
    )


def test_a_model_object_is_written_anew_when_anything_that_is_saved_with_it_has_changed(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_model(tmp_path / "model")

    def digest(change: Any = lambda model, tokenizer: None, alpha: int | None = None) -> str:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        if alpha is not None:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        change(model, tokenizer)
        return _digest_of_model(model, tokenizer)

    found = [
        digest(),
        digest(lambda model, tokenizer: setattr(tokenizer, "eos_token", "7")),
        digest(lambda model, tokenizer: setattr(tokenizer, "padding_side", "left")),
        digest(lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", 3)),
        digest(alpha=4),
        digest(alpha=8),
    ]
    assert len(set(found)) == len(found)
    assert digest() == found[0], "and once where nothing has"
    assert digest(lambda model, tokenizer: tokenizer(["1", "11"], padding=True)) == found[0]
    assert digest(alpha=8) == found[-1]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: sapo.train("quickstart", learning_rat=1), r"no argument 'learning_rat'; did you mean learning_rate"),
        (lambda: sapo.train("quickstart", reward=len), r"takes no argument 'reward'; did you mean rewards\?"),
        (lambda: sapo.train("quickstart", every=3), r"every is a setting of several sections: eval.every, checkpoint"),
        (lambda: sapo.train("quickstart", train__stepz=3), r"unknown key train.stepz; did you mean train.steps"),
        (lambda: sapo.train("quickstart", load_in_4bit=True), r"4bit: a base of 4 or 8 bits .* model.lora.rank=16"),
        (lambda: sapo.train("quikstart"), r"did you mean quickstart\?"),
        (lambda: sapo.train(rows=[{"prompt": "a", "answer": "b"}]), r"needs a model; got none; model= takes a path"),
        (lambda: sapo.train(model="somewhere"), r"needs something to train on; got neither rows nor tasks"),
        (lambda: sapo.train(model=3, rows=[]), r"a model must be a path, .* got a int"),
        (lambda: sapo.train(model="m", rows=[3]), r"row 1: a row must be a dict of columns; got a int"),
        (lambda: sapo.train(model="m", rows=3), r"rows must be a list of dicts, .* got a int"),
        (lambda: sapo.train(model="m", rows=[{"a": object()}]), r"row 1, column 'a': a value must be text.* a object"),
        (lambda: sapo.train("quickstart", rewards=3), r"rewards must be a function, a verifier's name"),
        (lambda: sapo.train("quickstart", callbacks=3), r"a callback must be a function of \(step, metrics\)"),
        (lambda: sapo.evaluate("model", "gsm8k", sample=3), r"sapo.evaluate takes no argument 'sample'; did you"),
        (lambda: sapo.evaluate("model"), r"needs something to evaluate on"),
        (lambda: sapo.generate("model", "a", temprature=1), r"did you mean temperature\?"),
        (lambda: sapo.compare("quickstart", objectve=["a"]), r"takes no argument 'objectve'; did you mean objective"),
        (lambda: sapo.compare("quickstart", rows=[{"prompt": "a", "answer": "b"}], rewards=lambda c: 1.0),
         r"processes of their own, and 'reward' is of this Python session alone"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_with_the_way_out(call: Any, line: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises((ConfigError, ModelError, TaskError), match=line) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_settings_by_keyword_are_those_of_the_recipe(tmp_path: Path) -> None:
    config = make_config(
        "quickstart", overrides={"steps": 3, "eval__every": 0, "rollout": {"temperature": 0.5}, "seed": 4}
    )
    assert (config.train.steps, config.eval.every, config.rollout.temperature, config.seed) == (3, 0, 0.5, 4)
    assert config.rollout.prompts_per_step == 32, "a section given as a dict is merged"
    assert config.run_dir == "runs/quickstart"
    model = write_model(tmp_path / "model")
    config = make_config("quickstart", model=model, overrides={})
    assert (config.model.path, config.model.coldstart) == (str(model), None)


def test_rows_of_pandas_and_datasets_and_splits_are_the_same_rows(tmp_path: Path, monkeypatch: Any) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path))
    rows = [{"prompt": f"{i}", "answer": str(i), "level": i} for i in range(3)]
    files = {write_rows(rows), write_rows(datasets.Dataset.from_list(rows)), write_rows(pandas.DataFrame(rows))}
    assert len(files) == 1
    assert [json.loads(line) for line in files.pop().read_text().splitlines()] == rows
    config = make_config(None, model="m", rows={"train": rows, "test": [{"prompt": "9", "answer": "9"}]}, overrides={})
    assert {"path", "held_out_path"} <= set(config.tasks[0].options)


def test_rewards_that_can_be_imported_are_named_and_others_stay_here() -> None:
    assert importable_name(json.dumps) == "json:dumps"
    assert verifier_settings({json.dumps: 0.5, "math": 1.0}) == [
        {"name": "json:dumps", "weight": 0.5},
        {"name": "math", "weight": 1.0},
    ]
    inner = lambda completion: 1.0  # noqa: E731
    name = verifier_settings(inner)
    assert name.startswith("in_process:reward@")
    assert verifier_settings({"name": inner, "deadline": 3}) == {"name": name, "deadline": 3}


def test_callbacks_are_objects_or_functions_and_a_misspelt_method_is_refused() -> None:
    class Patience:
        def on_evaluation(self, step: int, metrics: Any) -> bool:
            return metrics["pass@1"] > 0.5

    class Misspelt:
        def on_stpe(self, step: int, metrics: Any) -> None: ...

    told = Callbacks([Patience()])
    told.record({"kind": "eval", "step": 1, "pass@1": 0.5})
    assert not told.asked
    told.record({"kind": "eval", "step": 2, "pass@1": 0.6})
    assert told.asked
    with pytest.raises(ConfigError, match=r"got Misspelt.on_stpe; did you mean 'on_step'"):
        Callbacks([Misspelt()])
    with pytest.raises(ConfigError, match=r"a callback must be an object; got the class Patience; write it with \(\)"):
        Callbacks([Patience])
