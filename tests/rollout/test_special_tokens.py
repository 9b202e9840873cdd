"""Tokens that are more than text: special ones in stop strings, ends of turns, BOS and EOS, an embedding too small."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sapo.config import PromptConfig, RunConfig
from sapo.data import Group, Prompt
from sapo.errors import ConfigError, ModelError
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import tiny_model
from sapo.objectives import make_objective
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import GraphChoice, LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.stopping import StopRules
from sapo.run.preflight import TaskSet, check_prompts, prompt_warnings
from sapo.tasks import make_task
from sapo.tasks.generated.arithmetic import ArithmeticTask
from sapo.training.forward import loss_and_surrogate, response_logprobs
from sapo.training.packer import Packer
from sapo.training.settings import TrainerSettings

WORDS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *"0123456789+=-?", "\n", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(decoder=None, template: str | None = TEMPLATE, rows: int | None = None, adds: bool = False) -> Policy:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoder or decoders.Fuse()
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": [AddedToken(w, special=True) for w in WORDS[3:5]]})
    fast.chat_template = template
    shape = {"hidden_size": 16, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_length": 64}
    model = tiny_model("qwen3", rows or len(WORDS), seed=0, eos_token_id=1, pad_token_id=2, **shape)
    return prepare_policy(model, fast)


def test_a_stop_string_that_is_a_special_token_ends_completions() -> None:
    policy = make()
    end = WORDS.index("<|im_end|>")
    rules = StopRules(policy, [("<|im_end|>",), ("<|im_end|>\n",), ("7<|im_end|>",)], policy.stop_token_ids)
    seven, newline = WORDS.index("7"), WORDS.index("\n")
    assert rules.ends(0, [seven, end])
    assert not rules.ends(1, [seven, end])
    assert rules.ends(1, [seven, end, newline])
    assert rules.ends(2, [seven, end])
    assert not rules.ends(2, [newline, end])
    assert rules.text(0, [seven, end]) == "7"
    assert rules.text(1, [seven, end, newline]) == "7"
    assert rules.text(2, [seven, seven, end]) == "7"
    prompt = Prompt(id=1, task="t", text="", token_ids=(5, 6), stop=("<|im_end|>",))
    params = SamplingParams(max_new_tokens=40, seed=1, stop_token_ids=policy.stop_token_ids)
    drawn = LocalEngine(policy).generate([Request(prompt, 32)], params)[0]
    assert any(c.token_ids[-1] == end and c.finish_reason == "stop" for c in drawn)
    assert all(end not in c.token_ids[:-1].tolist() for c in drawn)


def recipe(**rollout: object) -> tuple[RunConfig, TaskSet]:
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "tasks": [{"name": "arithmetic", "digits": 1}],
            "train": {"steps": 1, "minibatches": 1},
            "prompt": {"style": "chat"},
            "rollout": {"max_new_tokens": 4, **rollout},
        }
    )
    task = make_task("arithmetic", seed=0, digits=1)
    assert isinstance(task, ArithmeticTask)
    return config, TaskSet([task], [task], {task.name: PromptFormat(style="chat")})


def test_an_end_of_turn_that_ends_nothing_is_warned_of() -> None:
    policy = make()
    end = WORDS.index("<|im_end|>")
    assert policy.end_of_turn() == (end, "<|im_end|>")
    (warning,) = prompt_warnings(*_with(policy, recipe()))
    assert f"set rollout.stop_token_ids=[{end}]" in warning
    assert prompt_warnings(*_with(policy, recipe(stop_token_ids=[end]))) == []


def _with(policy: Policy, made: tuple[RunConfig, TaskSet]) -> tuple[RunConfig, Policy, TaskSet]:
    return made[0], policy, made[1]


def test_a_text_that_begins_with_bos_is_given_no_other_and_no_end_is_appended() -> None:
    policy = make(adds=True)
    assert policy.encode("12") == (0, WORDS.index("1"), WORDS.index("2"))
    assert policy.encode("<s>12") == (0, WORDS.index("1"), WORDS.index("2"))


def test_a_chat_that_ends_in_an_assistants_turn_is_continued() -> None:
    policy = make()
    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "12"}]
    shown = policy.show(policy.encode_messages(chat))
    assert shown.endswith("12")
    assert shown.count("<|im_start|>") == 2


def test_a_token_without_a_row_of_the_embedding_is_one_line() -> None:
    policy = make(rows=8)
    with pytest.raises(ModelError, match=r"no more tokens than the embedding has rows; got token \d+"):
        policy.encode("9")
    policy.tokenizer.eos_token = "9"
    with pytest.raises(ModelError, match="end token must be one that the model can draw; got '9'"):
        check_prompts(*_with(policy, recipe()))


def test_a_decoder_with_blanks_between_words_has_texts_of_tokens_and_stop_strings() -> None:
    policy = make(decoder=decoders.WordPiece(prefix="##"))
    rules = StopRules(policy, [("7",), ("1 2",)], policy.stop_token_ids)
    one, two, seven = (WORDS.index(c) for c in "127")
    assert rules.ends(0, [one, seven])
    assert rules.ends(1, [one, two])
    assert not rules.ends(1, [two, two])
    assert torch.equal(rules.ends_SV[0].nonzero()[:, 0], torch.tensor([1, seven]))


def widened(rows: int = 40) -> Policy:
    """Return a policy whose head has rows that the tokenizer has no token for, twenty times as large as the others."""
    policy = make(rows=rows)
    with torch.no_grad():
        policy.head_weight[len(WORDS) :] *= 20
    return policy


def test_tokens_without_text_are_neither_drawn_nor_in_a_distribution() -> None:
    policy = widened()
    assert policy.unused_tokens == tuple(range(len(WORDS), 40))
    assert make().unused_tokens == ()
    prompt = Prompt(id=1, task="t", text="", token_ids=(5, 6))
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}]
    graphs: tuple[GraphChoice, ...] = (False, "eager")  # "eager" takes the steps that a GPU's graphs are made of
    for choice in graphs:
        for truncation in settings:
            params = SamplingParams(max_new_tokens=12, seed=1, stop_token_ids=policy.stop_token_ids, **truncation)
            drawn = LocalEngine(policy, 64, choice).generate([Request(prompt, 8)], params)[0]
            assert max(int(c.token_ids.max()) for c in drawn) < len(WORDS)


def test_an_end_token_without_text_is_drawn_where_the_model_names_it_and_refused_elsewhere() -> None:
    policy = make(rows=40)
    with pytest.raises(ConfigError, match="must be tokens of the tokenizer, since others are never drawn; got 30"):
        check_prompts(*_with(policy, recipe(stop_token_ids=[30])))
    policy.model.generation_config.eos_token_id = [1, 30]
    assert 30 not in Policy(policy.model, policy.tokenizer).unused_tokens
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = [77]
    with pytest.raises(ModelError, match=r"an end token must be one that the model can draw; got \[77\] of 40"):
        check_prompts(*_with(policy, recipe()))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_trainer_leaves_the_same_tokens_out_as_the_engine(softcap: float | None) -> None:
    policy = widened()
    policy.model.config.final_logit_softcapping = softcap
    prompt = Prompt(id=1, task="t", text="", token_ids=(5, 6))
    params = SamplingParams(max_new_tokens=12, seed=1, stop_token_ids=policy.stop_token_ids)
    completions = LocalEngine(policy).generate([Request(prompt, 4)], params)[0]
    groups = [Group(prompt, completions, advantages=(1.0, -1.0, 0.5, -0.5))]
    packer = Packer(normalizer="token_mean", tokens_per_microbatch=1000, max_new_tokens=12)
    (batch,) = packer.pack(groups, include_all=True).microbatches
    logprob_M = response_logprobs(policy, batch, 1.0)
    sampled_M = torch.cat([torch.from_numpy(c.logprobs.copy()) for c in completions])
    torch.testing.assert_close(logprob_M, sampled_M, atol=2e-5, rtol=0)
    settings = TrainerSettings(make_objective("grpo"), temperature=1.0)
    loss, head, _ = loss_and_surrogate(policy, batch, settings)
    loss.backward()
    assert torch.equal(head.logprob_M, logprob_M)
    assert head.entropy_M is not None
    assert bool(torch.isfinite(head.entropy_M).all())
    assert float(head.entropy_M.max()) <= math.log(len(WORDS)) + 1e-6
    rows = policy.head_weight.grad
    assert rows is not None
    assert not rows[len(WORDS) :].any()
    assert bool(rows[: len(WORDS)].any())


def test_the_text_of_a_completion_has_special_tokens_where_a_recipe_asks_for_them() -> None:
    policy = make()
    start, end, seven = (WORDS.index(w) for w in ("<|im_start|>", "<|im_end|>", "7"))
    rules = StopRules(policy, [(), ("<|im_end|>",)], policy.stop_token_ids)
    assert rules.text(0, [start, seven, 1], special=True) == "<|im_start|>7"
    assert rules.text(0, [start, seven, 1]) == "7"
    assert rules.text(1, [start, seven, end], special=True) == "<|im_start|>7"
    question = Prompt(id=0, task="t", text="1+1=")
    texts = {}
    for special in (False, True):
        form = PromptFormat.of(PromptConfig(special_tokens=special), make_task("arithmetic", seed=0, digits=1))
        (prompt,) = form.encode(policy, [question])
        params = SamplingParams(max_new_tokens=12, seed=1, stop_token_ids=policy.stop_token_ids)
        completions = LocalEngine(policy).generate([Request(prompt, 16)], params)[0]
        texts[special] = [c.text for c in completions]
    spelled = policy.special_texts().values()
    assert any(word in text for text in texts[True] for word in spelled)
    assert not any(text.endswith("</s>") for text in texts[True])
    assert [_without(text, spelled) for text in texts[True]] == texts[False]


def _without(text: str, words: Iterable[str]) -> str:
    for word in words:
        text = text.replace(word, "")
    return text
