"""Whole runs on pictures and text: what is trained, resumed to the bit, exported, and never merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import sapo
from sapo.config import RolloutConfig
from sapo.data import Score
from sapo.data.picture_files import decode_picture
from sapo.errors import ConfigError, ModelError
from sapo.evaluation import ask, evaluate_policy
from sapo.model.loading import load_policy
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.servers.engine import ServerEngine
from sapo.rollout.vllm.models import check_model
from sapo.run.models import load_model
from sapo.run.state import RunState
from sapo.tasks import make_task
from sapo.tasks.generated.picture_sums import PictureSumsTask
from sapo.training.checkpoint import list_checkpoints
from sapo.workflows.evaluate import EvaluatedModel
from sapo.workflows.export import export_model
from sapo.workflows.train import dry_run, resume
from support.engine_cases import assert_same
from support.pictures import encoded, noise
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_recipe
from support.vision_cases import OwnForward, make_vision_policy, shown
from support.vision_recipes import write_pictured_rows, write_vision_recipe


@pytest.fixture(autouse=True)
def _dense_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that an untrained model has something to learn from in every group, of pictures as of text."""
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(PictureSumsTask, "verify", lambda _, text, prompt: Score(text.count("7") / 8))
    monkeypatch.setattr(PictureSumsTask, "score_truncated", True, raising=False)


def train(directory: Path, should_stop=lambda: False, **changes: Any) -> Path:
    return sapo.train(sapo.load_recipe(write_vision_recipe(directory, **changes)), should_stop=should_stop).directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(train, tmp_path_factory)


def stop_after(updates: int, run: Path, calls: int = 0):
    """Ask to stop after so many updates, and so many more calls of `should_stop`: between updates, or in generation."""
    seen = 0

    def should_stop() -> bool:
        nonlocal seen
        lines = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        seen += lines.count('"kind": "update"') >= updates
        return seen > calls

    return should_stop


def changed(run: Path, directory: Path) -> set[str]:
    """What of the vision part and of the rest was trained."""
    before = load_policy(directory / "model")
    after = dict(load_policy(list_checkpoints(run / "checkpoints")[0].path).model.named_parameters())
    parts = {n: part for part in ("merger", "tower") for n, _ in before.vision.parameters(part)}
    return {parts.get(n, "decoder") for n, p in before.model.named_parameters() if not torch.equal(p, after[n])}


@pytest.mark.parametrize(
    ("part", "expected"),
    [("none", {"decoder"}), ("merger", {"decoder", "merger"}), ("tower", {"decoder", "merger", "tower"})],
)
def test_a_run_on_pictures_and_text_trains_what_it_is_asked_to(tmp_path, part, expected):
    run = train(tmp_path, model__vision__train=part, train__steps=2, train__activation_checkpointing=part == "tower")
    assert changed(run, tmp_path) == expected
    lines = metrics(run)
    (check,) = (m for m in lines if m["kind"] == "self_check")
    assert check["old_logprobs"] == "engine"
    assert sum(m["kind"] == "update" for m in lines) == 4


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, ((1, 0), (4, 3))),
        ({"rollout__staleness": 2, "model__vision__train": "tower"}, ((3, 0), (4, 5))),
        ({"architecture": "qwen3_vl_moe", "model__routing_replay": "R3"}, ((3, 0),)),
        ({"architecture": "qwen3_vl_moe", "model__routing_replay": "R2"}, ((3, 0),)),
    ],
)
def test_a_stopped_run_resumes_to_the_bit(tmp_path, changes, stops):
    """Between the updates of a step, in generation, and with batches that wait."""
    options = {"train__steps": 4, "checkpoint__every": 1, **changes}
    whole = train(tmp_path / "whole", **options)
    for updates, calls in stops:
        directory = tmp_path / f"stopped{updates}"
        run = train(directory, should_stop=stop_after(updates, directory / "run", calls), **options)
        assert sum(m["kind"] == "update" for m in metrics(run)) < 8
        resume(run)
        assert fingerprint(run, 4) == fingerprint(whole, 4)


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.parametrize("part", ["tower", "none"])
def test_an_engine_beside_the_updates_draws_the_run_of_lockstep(tmp_path, whole, where, part):
    """Its pictures go with the prompts, its tower follows the trained one."""
    options = {"train__steps": 3, "rollout__staleness": 1, "model__vision__train": part}
    elsewhere = train(tmp_path / where, rollout__run_in=where, **options)
    assert fingerprint(elsewhere, 3) == fingerprint(whole(**options), 3)


def test_batches_that_wait_are_kept_with_their_pictures(tmp_path):
    stop = stop_after(5, tmp_path / "run")
    run = train(tmp_path, should_stop=stop, rollout__staleness=2, train__steps=6, checkpoint__every=1)
    checkpoint = list_checkpoints(run / "checkpoints")[0]
    state = RunState.deserialise(checkpoint.state(), checkpoint.batches())
    waiting = [g.prompt for batch in state.ahead for g in batch.groups]
    pictured = [p for p in waiting if p.pictures]
    assert len(pictured) == len([p for p in waiting if p.task.startswith("picture")]) > 0
    assert all(decode_picture(p.pictures[0]).size == (48, 16) for p in pictured)


def test_an_adapter_is_trained_resumed_and_exported_as_whole_weights(tmp_path):
    run = train(tmp_path, model__lora={"rank": 2, "alpha": 4}, train__steps=2)
    policy, _ = load_model(run)
    assert policy.vision is not None
    assert not any("visual" in n for n, p in policy.model.named_parameters() if p.requires_grad)
    export_model(run, tmp_path / "exported")
    exported = load_policy(tmp_path / "exported")
    prompt = shown(policy, "=", make_task("picture_sums", seed=0).train_prompt(0).pictures[0])
    request, params = Request(prompt, 4), SamplingParams(max_new_tokens=8)
    ours, theirs = (LocalEngine(p).generate([request], params)[0] for p in (policy, exported))
    for adapted, merged in zip(ours, theirs, strict=True):
        assert_same(adapted, merged)


def test_an_exported_model_gives_the_logits_of_the_run_in_transformers_alone(tmp_path):
    run = train(tmp_path, train__steps=2, model__vision__train="tower")
    export_model(run, tmp_path / "exported")
    policy, _ = load_model(run)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "exported", backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    question = make_task("picture_sums", seed=0).train_prompt(0)
    prompt = shown(policy, "=", *question.pictures)
    inputs = processor(images=[decode_picture(question.pictures[0])], return_tensors="pt")
    ids = torch.tensor([[*prompt.token_ids, *tokenizer("12")["input_ids"]]])
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        theirs = model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits[0, -3:-1]
        ours = OwnForward(policy).logits(prompt, tokenizer("12")["input_ids"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card


def test_the_rate_of_the_tower_is_scaled(tmp_path):
    options = {"model__vision__train": "tower", "train__steps": 1, "train__minibatches": 1, "train__warmup_steps": 0}

    def moved(scale: float) -> dict[str, float]:
        directory = tmp_path / str(scale)
        run = train(directory, model__vision__learning_rate_scale=scale, **options)
        before = dict(load_policy(directory / "model").model.named_parameters())
        after = load_policy(list_checkpoints(run / "checkpoints")[0].path).model.named_parameters()
        moves = {n: (p - before[n]).abs().max().item() for n, p in after}
        return {
            part: max(m for n, m in moves.items() if ("visual" in n) == (part == "tower")) for part in ("tower", "rest")
        }

    # AdamW's first step is the rate itself, in every weight with a gradient: 1e-3, and a tenth of it.
    assert moved(1.0) == pytest.approx({"tower": 1e-3, "rest": 1e-3}, rel=0.01)
    assert moved(0.1) == pytest.approx({"tower": 1e-4, "rest": 1e-3}, rel=0.01)
    with pytest.raises(ConfigError, match="learning_rate_scale=2 is of what is trained"):
        sapo.load_recipe(write_vision_recipe(tmp_path / "none", model__vision__learning_rate_scale=2.0))


def test_pictures_are_refused_before_anything_is_written_where_they_cannot_be_shown(tmp_path):
    recipe = write_vision_recipe(tmp_path)
    text = write_recipe(tmp_path / "text") if (tmp_path / "text").mkdir() is None else None
    with pytest.raises(ModelError, match="task 'picture_sums1' shows pictures, and Qwen3ForCausalLM takes text alone"):
        sapo.train(sapo.load_recipe(recipe, [f"model.path={text.parent / 'model'}"]))
    with pytest.raises(ConfigError, match="in a model of 64"):
        sapo.train(sapo.load_recipe(recipe, ["rollout.max_new_tokens=60"]))
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm takes pictures for models of .*; got qwen3_5; set"):
        check_model(make_vision_policy("qwen3_5"))
    with pytest.raises(ConfigError, match=r"rollout\.servers takes models of text so far; got Qwen3VL"):
        ServerEngine(load_policy(tmp_path / "model"), RolloutConfig(engine="vllm", servers=1))
    assert not (tmp_path / "run").exists()


def test_a_picture_too_long_for_the_model_is_refused_before_the_run_unless_it_is_scaled_down(tmp_path, monkeypatch):
    """160 x 144 pixels are 10 x 9 tokens of 16 x 16 pixels, counted where the prompt is expanded; the model has 64."""
    monkeypatch.chdir(tmp_path)
    recipe = write_pictured_rows(tmp_path, train__steps=1)
    (tmp_path / "7.png").write_bytes(encoded(noise(7, 160, 144)))
    with pytest.raises(ConfigError, match=r"got 12 with a prompt of 93 tokens .* in a model of 64"):
        sapo.train(sapo.load_recipe(recipe))
    assert not (tmp_path / "run").exists()
    sapo.train(sapo.load_recipe(recipe, ["model.vision.max_tokens_per_picture=16"]))


def test_a_dry_run_counts_the_pictures(tmp_path):
    frozen = dry_run(sapo.load_recipe(write_vision_recipe(tmp_path)))
    trained = dry_run(sapo.load_recipe(write_vision_recipe(tmp_path, model__vision__train="tower")))
    assert frozen.prompts[0].text == "<|vision_start|><picture 48x16, 3 tokens><|vision_end|>="
    update = "update, forward"
    assert "activations of the vision tower" not in frozen.memory.phases[update]
    assert trained.memory.phases[update]["activations of the vision tower"] > 0
    assert "features of pictures" in frozen.memory.phases[update]
    assert "features of pictures" not in trained.memory.phases[update]
    # Four pictures a step of 6 x 2 patches of 3 x 8 x 8 float32.
    assert frozen.memory.phases[update]["pixels of pictures"] == pytest.approx(4 * 12 * 192 * 4, rel=1e-3)


def test_an_evaluation_names_its_problems_by_their_pictures(tmp_path):
    write_vision_recipe(tmp_path)
    policy, _ = load_model(tmp_path / "model")
    task = make_task("picture_sums", seed=0)
    params = SamplingParams(max_new_tokens=4)
    found = evaluate_policy(policy, LocalEngine(policy), task, problems=8, samples=2, params=params)
    assert len({a.key for a in found.answered}) == 8
    assert all(a.seen.startswith("<|vision_start|><picture 48x16, 3 tokens>") for a in found.answered)
    assert EvaluatedModel.load(tmp_path / "model").policy.vision.family.processor.size["longest_edge"] == 1024 * 256
    assert len(ask(policy, task, 8)) == 8
