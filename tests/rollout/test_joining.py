"""Tasks with tools, and environments of others, played by an engine: prompts, observations, failures."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest

from sapo.config import PromptConfig
from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Prompt, Score, Status
from sapo.environments.adapters.skyrl import SkyRlEnvironment
from sapo.environments.tool_task import WithTools
from sapo.errors import ModelError
from sapo.model.policy import Policy
from sapo.rollout.episodes.bridge import Bridge
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.joining import PlainJoiner, joiners_for
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat

TEMPLATE = (
    "{% if tools %}{% for t in tools %}={{ t['function']['name'] | length }}{% endfor %}<eos>{% endif %}"
    "{% for m in messages %}{% if m.get('tool_calls') %}{{ m['tool_calls'][0]['function']['arguments']['x'] }}"
    "{% else %}{{ m['content'] }}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)
"""Of the alphabet of the tests' tiny policies: the tools by the lengths of their names."""


def double(n: int) -> int:
    """Double.

    Args:
        n: the number.
    """
    return 2 * n


def halve(number: int) -> int:
    """Halve.

    Args:
        number: the number.
    """
    return number // 2


class Rows:
    """Two prompts, of which one offers a single tool."""

    name = "rows"
    num_train = 2

    def train_prompt(self, index: int) -> Prompt:
        offered = {"tools": ["halve"]} if index % 2 else {}
        return Prompt(index, self.name, f"{index}+1=", answer="1", metadata=offered)

    def held_out(self, count: int) -> list[Prompt]:
        return [self.train_prompt(i) for i in range(count)]

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Score(float(text.startswith("1")))


class Says(WithTools):
    """Answers each turn as a tool would, whatever the model drew."""

    async def play(self, prompt: Prompt, ask: Any) -> Score:
        await ask()
        await ask(
            [{"role": "tool", "name": "double", "content": "42"}, {"role": "tool", "name": "halve", "content": "7"}]
        )
        return Score(1.0)


def joiner_of(policy: Policy, task: Any) -> Any:
    return joiners_for(policy, task, PromptFormat.of(PromptConfig(), task), task.train_prompt(0))["rows"]


def driver(policy: Policy, joiner: Any, **turns: Any) -> EpisodeDriver:
    params = SamplingParams(max_new_tokens=12, seed=3, stop_token_ids=policy.stop_token_ids)
    limits = TurnsConfig(**{"tokens_per_turn": 4, **turns})
    return EpisodeDriver(policy, LocalEngine(policy), params, limits, {"rows": joiner})


@pytest.fixture
def chatty(new_policy: Any) -> Policy:
    policy: Policy = new_policy("qwen3")
    policy.tokenizer.chat_template = TEMPLATE
    return policy


def test_a_template_shows_the_tools_that_a_row_offers(chatty: Policy) -> None:
    task = WithTools(Rows(), [double, halve])
    form = PromptFormat.of(PromptConfig(), task)
    all_of_them, one = form.encode(chatty, [task.train_prompt(0), task.train_prompt(1)])
    assert chatty.show(all_of_them.token_ids) == "=6=5<eos>0+1=<eos>?"
    assert chatty.show(one.token_ids) == "=5<eos>1+1=<eos>?"
    assert form.rendered(chatty, task.train_prompt(1)) == "=5<eos>1+1=<eos>?"


def test_results_of_tools_stand_between_turns_as_the_template_writes_them(chatty: Policy) -> None:
    task = Says(Rows(), [double, halve])
    form = PromptFormat.of(PromptConfig(), task)
    joiner = joiner_of(chatty, task)
    assert isinstance(joiner, Bridge)
    prompts = form.encode(chatty, [task.train_prompt(0)])
    for completion in driver(chatty, joiner).play([Play(task, prompts[0], 3)])[0]:
        assert completion.score.reward == 1.0
        (observation,) = completion.observations
        first = completion.token_ids[: observation.at].tolist()
        ended = first[-1] == chatty.tokenizer.eos_token_id
        assert chatty.show(observation.token_ids) == ("" if ended else "<eos>") + "42<eos>7<eos>?"


def test_results_of_tools_stand_line_by_line_in_plain_text(new_policy: Any) -> None:
    policy = new_policy("qwen3")
    task = WithTools(Rows(), [double])
    joiner = joiner_of(policy, task)
    assert isinstance(joiner, PlainJoiner)
    assert policy.show(joiner.between([{"role": "tool", "content": "42"}], None)) == "42"
    with pytest.raises(ValueError, match="cannot encode"):
        joiner.between([{"role": "tool", "content": "42"}] * 2, None)  # the alphabet has no line ends
    with pytest.raises(ValueError, match="content of text"):
        joiner.between([{"role": "tool", "content": None}], None)


def test_what_the_template_would_change_is_said(chatty: Policy) -> None:
    shown = "{{ m['content'] }}"
    chatty.tokenizer.chat_template = TEMPLATE.replace(shown, shown + "{% if loop.last %}={% endif %}")
    (notice,) = joiner_of(chatty, WithTools(Rows(), [double])).notices
    assert "would change earlier turns" in notice
    assert "answer, user" in notice


def test_a_template_that_shows_no_tools_is_refused(chatty: Policy) -> None:
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    task = WithTools(Rows(), [double])
    with pytest.raises(ModelError, match="no bridge between the turns 'call, tool'"):
        joiner_of(chatty, task)


class Gym:
    """A skyrl-gym environment that is good, or bad in one way on samples of its second prompt."""

    def __init__(self, extras: dict[str, Any], fault: str) -> None:
        self.fault = fault if extras["prompt"].startswith("1") else ""
        self.turns = 0

    def init(self, prompt: Any) -> Any:
        return prompt, {}

    def step(self, action: str) -> Any:
        self.turns += 1
        if self.fault == "raise":
            raise RuntimeError("broken")
        if self.fault == "exit":
            raise SystemExit(3)
        if self.fault == "hang":
            threading.Event().wait(20)
        reward = {"nan": float("nan"), "text": "1.0", "huge": 1e300}.get(self.fault, 0.5)
        said = [{"role": "user", "content": {"surrogate": "\ud800", "alien": "é"}.get(self.fault, "4")}]
        return {"observations": said, "reward": reward, "done": self.turns == 2}

    def close(self) -> None:
        if self.fault == "close":
            raise RuntimeError("cannot close")


def bits(completions: tuple[Completion, ...]) -> str:
    return json.dumps([[c.token_ids.tolist(), np.asarray(c.logprobs).tolist(), c.score.reward] for c in completions])


@pytest.mark.parametrize("fault", ["nan", "text", "huge", "raise", "exit", "hang", "surrogate", "alien", "close"])
def test_a_bad_environment_costs_its_episodes_and_moves_no_other(policies: Any, fault: str) -> None:
    policy = policies("qwen3")
    task = SkyRlEnvironment(Rows(), lambda extras: Gym(extras, fault))
    good = SkyRlEnvironment(Rows(), lambda extras: Gym(extras, ""))
    form = PromptFormat.of(PromptConfig(), task)
    prompts = form.encode(policy, [task.train_prompt(0), task.train_prompt(1)])

    def played(environment: Any) -> list[tuple[Completion, ...]]:
        playing = driver(policy, PlainJoiner(policy), seconds_per_reply=1.0 if fault == "hang" else 30.0)
        return playing.play([Play(environment, p, 2) for p in prompts])

    fine, failed = played(task)
    assert {c.score.status for c in failed} == {Status.ENVIRONMENT_ERROR}
    assert {c.score.status for c in fine} == {Status.SCORED}
    assert bits(fine) == bits(played(good)[0])
