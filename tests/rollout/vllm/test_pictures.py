"""Prompts with pictures on the engine `vllm`: its log-probabilities are the policy's, of text and of the vision tower.

vLLM keeps what its tower has computed of a picture. Where only the tower has changed, nothing but a reset of that cache
brings the change into the next draw.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import sapo
from sapo.config import VllmConfig
from sapo.data import Score
from sapo.errors import ParityError
from sapo.model.adapters import add_adapter
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.vllm.engine import VllmEngine
from sapo.tasks.generated.picture_sums import PictureSumsTask
from support.engine_cases import assert_same, flat, params
from support.pictures import picture
from support.runs import REWARD, metrics
from support.vision_cases import OwnForward, make_vision_model, make_vision_policy, mixed_prompts, shown
from support.vision_recipes import write_pictured_rows, write_vision_recipe
from support.vllm_cases import SHAPE, disturb, needs_vllm

pytestmark = needs_vllm

TOLERANCE = 1e-4
SMALL_CACHE = VllmConfig(kv_cache_gib=0.25)
UNTIED = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen2_vl", "smolvlm", "internvl", "llava")


def wide_vision_policy(name: str = "qwen3_vl", **options: Any) -> Policy:
    """A policy whose heads have 32 channels."""
    if not name.startswith("qwen3_vl"):
        return make_vision_policy(name, one_head=True, **options)
    return make_vision_policy(name, **{**SHAPE, "intermediate_size": 64, **options})


@torch.no_grad()
def gap(engine: VllmEngine, policy: Policy, requests: list[Request], **options: Any) -> float:
    """Return the largest difference of a log-probability from the model's own forward, tower included."""
    own = OwnForward(policy)
    drawn = engine.generate(requests, params(**options))
    return max(
        float((own.logprobs(asked.prompt, c.token_ids.tolist()) - torch.tensor(c.logprobs)).abs().max())
        for asked, group in zip(requests, drawn, strict=True)
        for c in group
    )


@torch.no_grad()
def disturb_tower(policy: Policy, share: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in ("merger", "tower"):
        for _, parameter in policy.vision.parameters(part):
            parameter.add_(share * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    policy.vision.forget()


def keep_features(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM keep what the old tower has computed: its frontend, scheduler and worker each forget by themselves."""
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for kind in (LLMEngine, GPUModelRunner):
        patch.setattr(kind, "reset_encoder_cache", lambda self: None)


def long_prompts(policy: Policy) -> list[Request]:
    """One question about two pictures of one size, of more tokens than a block of vLLM's cache (128) has."""
    return [Request(shown(policy, "ab", picture(i, 224, 208), prompt_id=i), 2) for i in (1, 2)]


def tied_vision_policy(name: str) -> Policy:
    options = SHAPE if name == "qwen3_vl" else {"one_head": True}
    model, family = make_vision_model(name, **options)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)  # logits that are neither flat nor those of the last token
    return prepare_policy(model, family.tokenizer, family)


CASES = [*((wide_vision_policy, name) for name in UNTIED), *((tied_vision_policy, n) for n in ("qwen3_vl", "idefics3"))]


@pytest.mark.parametrize(("make", "name"), CASES)
def test_two_pictures_text_and_one_picture_in_a_batch_are_drawn_as_by_the_local_engine(make, name: str) -> None:
    policy = make(name)
    requests = [Request(prompt, 2) for prompt in mixed_prompts(policy)]
    greedy = params(temperature=0.0, max_new_tokens=12, stop_token_ids=frozenset())

    def check() -> None:
        local = flat(LocalEngine(policy).generate(requests, greedy))
        for ours, theirs in zip(flat(engine.generate(requests, greedy)), local, strict=True):
            assert_same(ours, theirs)
        assert gap(engine, policy, requests) < TOLERANCE

    with closing(VllmEngine(policy, settings=SMALL_CACHE)) as engine:
        engine.set_weights(policy.weights(), 0)
        check()
        for update, change in enumerate((disturb, disturb_tower), start=1):
            change(policy)
            assert gap(engine, policy, requests) > 10 * TOLERANCE, "nothing has changed that could go wrong"
            engine.set_weights(policy.weights(), update)
            check()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return wide_vision_policy()


@pytest.fixture(scope="module")
def engine(policy: Policy):
    with closing(VllmEngine(policy, max_rows=16, settings=SMALL_CACHE)) as made:
        made.set_weights(policy.weights(), 0)
        yield made


def test_an_image_token_that_is_sampled_is_a_token_like_any_other(engine: VllmEngine, policy: Policy) -> None:
    requests = [Request(prompt, 40) for prompt in mixed_prompts(policy)]
    drawn = engine.generate(requests, params(stop_token_ids=frozenset()))
    image = policy.vision.family.image_token_id
    # Followed by others, which are computed from it.
    assert sum(image in c.token_ids[:-1] for c in flat(drawn)) > 10
    assert gap(engine, policy, requests, stop_token_ids=frozenset()) < TOLERANCE


def test_prompts_that_differ_in_their_pictures_alone_share_nothing(engine: VllmEngine, policy: Policy) -> None:
    for _ in range(2):  # the second time, vLLM has both in its cache
        assert gap(engine, policy, long_prompts(policy)) < TOLERANCE


def test_what_was_kept_of_pictures_is_forgotten_with_the_old_tower(
    engine: VllmEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = long_prompts(policy) + [Request(prompt, 2) for prompt in mixed_prompts(policy)]
    assert gap(engine, policy, requests) < TOLERANCE
    disturb_tower(policy)
    with monkeypatch.context() as patch:
        keep_features(patch)
        engine.set_weights(policy.weights(), 1)
        assert gap(engine, policy, requests) > 10 * TOLERANCE, "the fault that the reset is for"
    engine.set_weights(policy.weights(), 2)
    assert gap(engine, policy, requests) < TOLERANCE


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_an_adapter_of_the_decoder_is_followed(sync: str) -> None:
    policy = wide_vision_policy()
    add_adapter(policy, rank=2, alpha=4.0, targets="all-linear", seed=1)
    assert not any("visual" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    requests = [Request(prompt, 2) for prompt in mixed_prompts(policy)]
    with closing(VllmEngine(policy, settings=VllmConfig(kv_cache_gib=0.25, lora_sync=sync))) as engine:
        for update in range(2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 8)
            engine.set_weights(policy.weights(), update)
            assert gap(engine, policy, requests) < TOLERANCE


def test_pixels_have_the_precision_of_a_model_of_16_bits() -> None:
    model, family = make_vision_model("llava", 2.0, one_head=True)
    policy = prepare_policy(model.to(torch.bfloat16), family.tokenizer, family)
    requests = [Request(prompt, 2) for prompt in mixed_prompts(policy)]
    with closing(VllmEngine(policy, settings=SMALL_CACHE)) as engine:
        engine.set_weights(policy.weights(), 0)
        # bfloat16 keeps 8 bits: single log-probabilities are off by some hundredths.
        assert gap(engine, policy, requests) < 0.1


@pytest.fixture
def _dense_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that an untrained model has something to learn from in every group."""
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(PictureSumsTask, "verify", lambda _, text, prompt: Score(text.count("7") / 8))
    monkeypatch.setattr(PictureSumsTask, "score_truncated", True, raising=False)


ON_VLLM = {
    "more": {"heads": 1},  # of 32 channels
    "rollout__engine": "vllm",
    "rollout__vllm": {"kv_cache_gib": 0.25},
    "model__vision__train": "tower",
    "train__learning_rate": 3e-3,
    "eval__every": 0,
    "checkpoint__every": 0,
}


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [m for m in metrics(run) if m["kind"] == kind]


@pytest.mark.usefixtures("_dense_reward")
def test_a_run_on_pictures_and_text_learns_on_policy(tmp_path: Path) -> None:
    recipe = write_vision_recipe(tmp_path, **{**ON_VLLM, "train__steps": 20})
    run = sapo.train(sapo.load_recipe(recipe)).directory
    rewards = [m["reward/mean"] for m in of_kind(run, "step")]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
    (check,) = of_kind(run, "self_check")
    assert (check["old_logprobs"], check["equal"]) == ("engine", True)
    on_policy = [m["ratio/abs_dev"] for m in of_kind(run, "update") if m["on_policy"] and "ratio/abs_dev" in m]
    assert len(on_policy) > 10
    assert max(on_policy) < 1e-5
    assert max(m["log_ratio/max_abs"] for m in of_kind(run, "parity")) < 1e-4


@pytest.mark.usefixtures("_dense_reward")
def test_features_of_an_old_tower_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_pictured_rows(tmp_path, **{**ON_VLLM, "train__learning_rate": 1e-2, "train__warmup_steps": 0})
    rows = (tmp_path / "pictures.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pictures.jsonl").write_text("".join(rows[:4]))  # every step shows the same ones
    monkeypatch.chdir(tmp_path)
    keep_features(monkeypatch)
    with pytest.raises(ParityError, match=r"step 2: the engine does not sample with the policy's weights"):
        sapo.train(sapo.load_recipe(recipe))
