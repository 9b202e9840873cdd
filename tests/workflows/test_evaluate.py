"""An evaluation with a real model: kept or not it is the same, and what is kept is not mixed with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sapo
from sapo.config import PromptConfig
from sapo.errors import ConfigError, Interrupted
from sapo.evaluation import Results, read_results
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.tasks import FileTask, make_task
from sapo.workflows import evaluate as evaluation_order
from sapo.workflows.evaluation_plan import plan_evaluations
from support.pictures import encoded, noise
from support.row_cases import TOKENIZER, stablelm
from support.runs import metrics, write_model, write_recipe
from support.vision_recipes import write_vision_recipe

QUICK = {"problems": 12, "samples": 3, "max_new_tokens": 8, "device": "cpu"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_order, "CHUNK_SEQUENCES", 12)  # 4 problems of 3 samples


def without_clock(directory: Path) -> dict:
    record = read_results(directory)
    del record["timing"]
    return record


def test_what_is_kept_is_what_is_returned(model: Path, tmp_path: Path) -> None:
    task = make_task("arithmetic", seed=0, digits=2)
    options = {**QUICK, "ks": (1, 3), "greedy": True, "constant": True}
    kept = sapo.evaluate(model, task, out=tmp_path / "e", **options)
    plain = sapo.evaluate(model, task, **options)
    assert kept == plain
    read = Results.read(tmp_path / "e")
    assert read.evaluation == kept
    assert read.about["model"]["path"] == str(model)
    assert read.about["machine"]["threads"] == torch.get_num_threads()
    assert sorted(p.name for p in (tmp_path / "e").iterdir() if not p.name.startswith(".")) == [
        "completions.jsonl",
        "config.json",
        "index.html",
        "results.json",
    ]


@pytest.mark.parametrize("stop_after", [1, 4, 9, 13])
def test_an_evaluation_that_was_stopped_goes_on_to_the_same_results(
    model: Path, tmp_path: Path, stop_after: int
) -> None:
    task = make_task("arithmetic", seed=0, digits=2)
    sapo.evaluate(model, task, out=tmp_path / "whole", greedy=True, **QUICK)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * stop_after

    with pytest.raises(Interrupted):
        sapo.evaluate(model, task, out=tmp_path / "e", greedy=True, should_stop=should_stop, **QUICK)
    sapo.evaluate(model, task, out=tmp_path / "e", greedy=True, **QUICK)
    assert without_clock(tmp_path / "e") == without_clock(tmp_path / "whole")
    assert (tmp_path / "e/completions.jsonl").read_bytes() == (tmp_path / "whole/completions.jsonl").read_bytes()
    assert (tmp_path / "e/index.html").read_bytes() == (tmp_path / "whole/index.html").read_bytes()


def test_a_finished_one_is_counted_again_without_drawing(model: Path, tmp_path: Path, monkeypatch) -> None:
    task = make_task("arithmetic", seed=0, digits=2)
    sapo.evaluate(model, task, out=tmp_path / "e", **QUICK)
    before, clock = without_clock(tmp_path / "e"), read_results(tmp_path / "e")["timing"]
    monkeypatch.setattr(LocalEngine, "generate", lambda *_: pytest.fail("it draws"))
    result = sapo.evaluate(model, task, out=tmp_path / "e", ks=(1, 2), **QUICK)
    assert set(result.pass_at) == {1, 2}
    after = without_clock(tmp_path / "e")
    assert "pass@2" in after["results"]
    del after["results"]["pass@2"]
    assert after == before
    assert read_results(tmp_path / "e")["timing"] == clock, "the time is that of the drawing"


CHANGES = {
    "samples": {"samples": 4},
    "sampling.temperature": {"params": SamplingParams(max_new_tokens=8, temperature=0.5)},
    "sampling.max_new_tokens": {"max_new_tokens": 9},
    "problems.count": {"problems": 11},
    "greedy": {"greedy": True},
    "prompt.template": {"prompt_format": PromptConfig(template="1{prompt}")},
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_evaluation_is_not_mixed_with_the_one_that_is_there(model: Path, tmp_path: Path, key: str) -> None:
    task = make_task("arithmetic", seed=0, digits=2)
    sapo.evaluate(model, task, out=tmp_path / "e", **QUICK)
    before = {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir()}
    with pytest.raises(ConfigError, match=rf"holds another evaluation, with {key}="):
        sapo.evaluate(model, task, out=tmp_path / "e", **{**QUICK, **CHANGES[key]})
    assert {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir()} == before


def test_other_weights_and_other_rows_are_another_evaluation(model: Path, tmp_path: Path) -> None:
    task = make_task("arithmetic", seed=0, digits=2)
    sapo.evaluate(model, task, out=tmp_path / "e", **QUICK)
    with pytest.raises(ConfigError, match=r"with model.weights="):
        sapo.evaluate(write_model(tmp_path / "other", seed=1), task, out=tmp_path / "e", **QUICK)
    with pytest.raises(ConfigError, match=r"with problems.rows="):
        sapo.evaluate(model, make_task("arithmetic", seed=1, digits=2), out=tmp_path / "e", **QUICK)
    same = write_model(tmp_path / "copied")
    sapo.evaluate(same, task, out=tmp_path / "e", **QUICK)  # the same weights elsewhere: the same evaluation


def test_a_row_whose_answer_was_mended_is_another_row(model: Path, tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text('{"prompt": "9+9=", "answer": "18"}\n')

    def task(answer: str) -> FileTask:
        rows = [{"prompt": f"{i}+1=", "answer": answer if i == 3 else "1"} for i in range(8)]
        held_out.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return FileTask(train, held_out_path=held_out)

    sapo.evaluate(model, task("1"), out=tmp_path / "e", **QUICK)
    with pytest.raises(ConfigError, match=r"with problems.rows="):
        sapo.evaluate(model, task("2"), out=tmp_path / "e", **QUICK)


def test_a_row_whose_picture_was_replaced_is_another_row(tmp_path: Path) -> None:
    write_vision_recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "<image>1+1=", "answer": "2", "image": "shown.png"}))

    def evaluate(seed: int) -> None:
        (tmp_path / "shown.png").write_bytes(encoded(noise(seed)))
        task = FileTask(tmp_path / "rows.jsonl", held_out_fraction=1.0)
        sapo.evaluate(tmp_path / "model", task, out=tmp_path / "e", **QUICK)

    evaluate(1)
    with pytest.raises(ConfigError, match=r"holds another evaluation, with problems\.rows="):
        evaluate(2)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    task = make_task("arithmetic", seed=0, digits=2)
    with pytest.raises(ConfigError, match=r"--max-new-tokens must leave room .* got 60 .* in a model of 64"):
        sapo.evaluate(model, task, out=tmp_path / "e", **{**QUICK, "max_new_tokens": 60})
    assert not (tmp_path / "e").exists()


def test_the_prompts_are_put_as_asked_and_kept_as_the_model_saw_them(model: Path, tmp_path: Path) -> None:
    task = make_task("arithmetic", seed=0, digits=1)
    form = PromptConfig(template="{prompt}", shots=[{"prompt": "1+1=", "answer": "#2"}], answer_template="{answer};")
    result = sapo.evaluate(model, task, prompt_format=form, **{**QUICK, "problems": 1})
    problem = result.answered[0]
    assert problem.seen.replace(" ", "").endswith(f"1+1=#2;{problem.prompt}")


def test_a_run_evaluated_again_gives_the_figures_it_logged_last(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(evaluation_order, "CHUNK_SEQUENCES", 256)  # one chunk, as the loop draws them
    run = sapo.train(sapo.load_recipe(write_recipe(tmp_path)))
    logged = [line for line in metrics(run.directory) if line["kind"] == "eval"][-1]
    (planned,) = plan_evaluations(run.directory, [], [])
    subject = evaluation_order.EvaluatedModel.load(run.directory)
    again = planned.run(subject).evaluation.metrics()
    assert {k: again[k] for k in again if k in logged} == {k: logged[k] for k in again if k in logged}
    assert {"mean@2", "pass@1", "reward/mean", "status/scored"} <= set(again) & set(logged)


def test_a_slow_way_to_run_is_said_once(tmp_path: Path) -> None:
    directory, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    stablelm().save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": "7"}) + "\n" for i in range(4)))
    subject = evaluation_order.EvaluatedModel.load(directory)
    said: list[str] = []
    few = {"samples": 1, "max_new_tokens": 2}
    for _ in range(2):
        (planned,) = plan_evaluations(directory, [str(rows)], ["verifier=last_number"], **few)
        planned.run(subject, report=said.append)
    assert [("StableLmForCausalLM" in text, "rows" in text) for text in said] == [(True, True)], said
