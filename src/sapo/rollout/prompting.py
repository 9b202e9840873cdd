"""Format a task's question for the model: chat template or plain text, few-shot examples, stop strings.

A task knows only text and a policy only token ids. This file turns the one into the other, for rollout, evaluation and
the cold start alike. What the model emits is never encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from sapo.config import PromptConfig, RunConfig
from sapo.data import Prompt
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.rollout.encoded import EncodedPrompts
from sapo.tasks import Task


@dataclass(frozen=True)
class PromptFormat:
    """The format of the prompts of one task.

    >>> form = PromptFormat(template="Q: {prompt}\\nA:", shots=(("1 + 1 =", "2"),), stop=("\\n",))
    >>> print(form.text(Prompt(id=0, task="sums", text="3 + 4 =")))
    Q: 1 + 1 =
    A: 2
    Q: 3 + 4 =
    A:
    """

    style: Literal["auto", "plain", "chat"] = "auto"
    system: str | None = None
    thinking: bool | None = None
    template: str = "{prompt}"
    answer_template: str = " {answer}\n"
    shots: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()
    prefers_chat: bool = False
    """Whether `auto` takes the tokenizer's chat template for a question in plain text."""

    @classmethod
    def of(cls, config: PromptConfig, task: Task) -> PromptFormat:
        """Make the format that a recipe gives to a task, with examples of the task where it asks for them.

        Raises:
            ConfigError: the recipe asks for examples and the task has none.
        """
        if isinstance(config.shots, list):
            shots = tuple((s.prompt, s.answer) for s in config.shots)
        elif config.shots and not hasattr(task, "shots"):
            raise ConfigError(
                f"prompt.shots={config.shots} asks task {task.name!r} for examples and it has none; "
                "write them in the recipe: shots: [{prompt: ..., answer: ...}]"
            )
        else:
            shots = tuple(task.shots(config.shots)) if config.shots else ()  # type: ignore[attr-defined]
        return cls(
            style=config.style,
            system=config.system,
            thinking=config.thinking,
            template=config.template,
            answer_template=config.answer_template,
            shots=shots,
            stop=tuple(config.stop),
            prefers_chat=getattr(task, "prefers_chat", False),
        )

    def encode(self, policy: Policy, prompts: Sequence[Prompt], *, keep: bool = True) -> list[Prompt]:
        """Return the prompts with their token ids and stop strings.

        Args:
            keep: keep the token ids, so that a prompt that comes again is not encoded again.

        Raises:
            ModelError: the tokenizer has no chat template, or no token for a part of the text.
            ConfigError: the rows are chat messages and the recipe asks for plain text.
        """
        self._encoded.reset_for(policy.tokenizer)
        return [replace(p, token_ids=self._token_ids(policy, p, keep), stop=self.stop) for p in prompts]

    def text(self, prompt: Prompt) -> str:
        """Return a plain prompt in full: system text, examples and question."""
        opening = f"{self.system}\n\n" if self.system else ""
        shots = [self._question(q) + self.answer_template.replace("{answer}", a) for q, a in self._shots_for(prompt)]
        return opening + "".join(shots) + self._question(prompt.text)

    def messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """Return the messages of a chat prompt. A row's own system message takes precedence."""
        own = [dict(m) for m in prompt.metadata.get("messages", ())]
        turns = own or [{"role": "user", "content": self._question(prompt.text)}]
        system = [turns.pop(0)] if turns[0]["role"] == "system" else []
        if not system and self.system:
            system = [{"role": "system", "content": self.system}]
        shots = [
            {"role": role, "content": content}
            for question, answer in self._shots_for(prompt)
            for role, content in (("user", self._question(question)), ("assistant", answer))
        ]
        return [*system, *shots, *turns]

    def _shots_for(self, prompt: Prompt) -> list[tuple[str, str]]:
        """Return the examples without the question itself, whose answer would be given away."""
        return [(question, answer) for question, answer in self.shots if question != prompt.text]

    def _question(self, text: str) -> str:
        return self.template.replace("{prompt}", text)  # not format(): questions hold braces of their own

    @cached_property  # not a field, so that equality, hashing and asdict() leave it out
    def _encoded(self) -> EncodedPrompts:
        return EncodedPrompts()

    def _token_ids(self, policy: Policy, prompt: Prompt, keep: bool) -> tuple[int, ...]:
        """Return the token ids of a prompt: those kept from before, or new ones."""
        token_ids = self._encoded.find(prompt)
        if token_ids is None:
            token_ids = self._new_token_ids(policy, prompt)
            if keep:
                self._encoded.add(prompt, token_ids)
        return token_ids

    def _new_token_ids(self, policy: Policy, prompt: Prompt) -> tuple[int, ...]:
        is_chat = "messages" in prompt.metadata
        if is_chat and self.style == "plain":
            raise ConfigError(
                f"prompt.style=plain cannot format the chat messages of task {prompt.task!r}; use style auto or chat"
            )
        if is_chat or self.style == "chat" or (self.style == "auto" and self.prefers_chat and policy.has_chat_template):
            return policy.encode_messages(self.messages(prompt), self.thinking)
        if self.thinking is not None:
            raise ConfigError(
                f"prompt.thinking is a switch of the chat template, and task {prompt.task!r} is in plain text; "
                "set prompt.style=chat or leave it out"
            )
        return policy.encode(self.text(prompt))


def formats_of(config: RunConfig, tasks: Sequence[Task]) -> dict[str, PromptFormat]:
    """Return the prompt format of each task of a recipe, by its name."""
    return {
        task.name: PromptFormat.of(t.prompt or config.prompt, task) for t, task in zip(config.tasks, tasks, strict=True)
    }


def encode_by_task(
    policy: Policy, formats: Mapping[str, PromptFormat], tasks: Iterable[Task], prompts: Sequence[Prompt]
) -> list[Prompt]:
    """Return training prompts with their token ids, each in the format of its task.

    The token ids of a finite task's rows are kept for the next epoch. Prompts of an endless task do not come again.
    """
    finite = {task.name: hasattr(task, "num_train") for task in tasks}
    return [formats[p.task].encode(policy, [p], keep=finite[p.task])[0] for p in prompts]
