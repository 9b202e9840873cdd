"""The adapter beside TRL 1.16 itself: the same tools, environment and turns in GRPOTrainer and here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import get_json_schema

from sapo.data import Prompt
from sapo.model.tiny import tiny_model
from sapo.tasks import make_task
from sapo.tasks.episodes.pool import close_hosts
from support.asking import play
from support.real_cases import SECONDS, assert_each_costs_its_own_episode, needs_real, rows_task, train_a_step
from support.real_trl import Counter, add
from support.templates import bpe_tokenizer, trl_templates

pytestmark = needs_real

OWN = "trl:support.real_trl:Counter"
TOOL = "support.real_trl:add"
END = "<|im_end|>"


@pytest.fixture(scope="module", autouse=True)
def _without_hosts() -> Iterator[None]:
    yield
    close_hosts()


def call(k: int) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': {'k': k}})}\n</tool_call>"


SCRIPT = [call(1) + "\n" + call(2), call(4), call(1), "Done."]
"""Two calls in one turn, one that raises, one more, and an answer."""


def trained_by_trl(directory: Path, **options: Any) -> Any:
    """Train one step with TRL's trainer, whose first sample follows SCRIPT and whose second answers at once."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = bpe_tokenizer(trl_templates()["qwen3"])
    tokenizer.eos_token, tokenizer.pad_token = END, "</s>"

    class Scripted(GRPOTrainer):
        """Draws what the script says; its own loop parses it, calls the tools and goes on."""

        told = 0

        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            said = [SCRIPT[self.told], "Done."][: len(prompt_ids)]
            self.told += 1
            return [tokenizer(text + END, add_special_tokens=False)["input_ids"] for text in said], None

        def _generate(self, prompts: list[Any]) -> Any:
            made = super()._generate(prompts)
            self.prompts_of_a_test, self.completions_of_a_test = prompts, made[3]
            return made

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            self.rewards_of_a_test = super()._calculate_rewards(*args, **kwargs)
            return self.rewards_of_a_test

    trainer = Scripted(
        tiny_model(
            "qwen3",
            len(tokenizer),
            seed=0,
            hidden_size=32,
            max_length=2048,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        args=GRPOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=1024,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Reach 7."}], "start": 3}] * 2),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer


def contents(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(m["name"], m["content"]) for m in messages if m["role"] == "tool"]


def assert_same_answers(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> None:
    """Results are the same texts. An error has the same words; TRL shows it as a dict."""
    assert [name for name, _ in ours] == [name for name, _ in theirs] == ["add"] * 4
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert mine == other or (mine == "error: four is too much" and other == "{'error': 'four is too much'}")


def test_an_environment_does_in_trl_what_it_does_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = trained_by_trl(tmp_path, environment_factory=Counter)
    task = make_task("same_prompt", seed=0, text="Reach 7.", environment=OWN)
    prompt = Prompt(0, "same_prompt", "Reach 7.", metadata={"start": 3})
    score, shown = play(task, prompt, *SCRIPT)
    assert_same_answers(
        [pair for said in shown[1:] for pair in contents(said)], contents(trainer.completions_of_a_test[0])
    )
    idle, _ = play(task, prompt, "Done.")
    assert trainer.rewards_of_a_test[:, 0].tolist() == pytest.approx([score.reward, idle.reward])
    assert (score.reward, idle.reward) == (1.0, 0.2)  # by hand: 3 + 1 + 2 + 1 is 7, and 3 is four away
    assert score.figures["tools/add/errors"] == 1.0
    assert shown[0] in trainer.prompts_of_a_test[0][-1]["content"], "there behind the user's words, here after them"
    assert list(task.toolbox.schemas) == [get_json_schema(tool) for tool in trainer._env_tools[None]]


def test_tools_do_in_trl_what_they_do_here(tmp_path: Path) -> None:
    said: list[str] = []

    def judged(completions: list[Any], **columns: Any) -> list[float]:
        said.extend(completion[-1]["content"] for completion in completions)
        return [float("Done" in completion[-1]["content"]) for completion in completions]

    trainer = trained_by_trl(tmp_path, tools=[add], reward_funcs=judged)
    spec = rows_task(tmp_path, "tools", {}, tools=[TOOL], verifier="support.real_trl:names_the_answer")
    options = {key: value for key, value in spec.items() if key not in ("name", "label")}
    task = make_task("file", seed=0, **options)
    score, shown = play(task, Prompt(0, "tools", "Reach 7.", answer="Done"), *SCRIPT)
    assert_same_answers(
        [pair for one in shown[1:] for pair in contents(one)], contents(trainer.completions_of_a_test[0])
    )
    assert said == ["Done.", "Done."]
    assert score.reward == 1.0 == trainer.rewards_of_a_test[0, 0]
    assert list(task.toolbox.schemas) == [get_json_schema(tool) for tool in trainer.tools]


def test_a_step_is_trained_on_both(tmp_path: Path) -> None:
    tasks = [
        rows_task(tmp_path, "counter", {"start": 3}, environment=OWN, calls="python"),
        rows_task(tmp_path, "tools", {}, tools=[TOOL], calls="python", verifier="support.real_trl:names_the_answer"),
    ]
    trained = train_a_step(tmp_path, tasks)
    for label in ("counter", "tools"):
        mine = [row for row in trained if row["task"] == label]
        assert len(mine) == 8
        assert any(len(row["observations"]) > 1 for row in mine), "some called a tool"
        assert len({row["reward"] for row in mine}) > 1


def test_a_failure_costs_its_own_episode_and_moves_no_other_by_a_bit() -> None:
    failures = {
        "nan": "a reward must be finite",
        "raises": "KeyError: 'board'",
        "hangs": f"no answer within {SECONDS:g} s",
        "crashes": "its worker process died (exit code 3)",
    }
    task = make_task("same_prompt", seed=0, text="Reach 7.", environment={"name": OWN, "calls": "python"})
    bad = {name: ({"start": 3, "fault": name}, detail) for name, detail in failures.items()}
    assert_each_costs_its_own_episode(task, {"start": 3}, bad)
